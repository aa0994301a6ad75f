"""What the README, and the page on adapting, show runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from pretrain import recipe as recipes
from tests.pretrain.finetune.processors import llava_processor, picture
from tests.pretrain.runs import tiny_recipe
from tests.zoo.adapt.families import llava
from zoo.adapt import AdaptConfig
from zoo.registry import _tables

README = Path(__file__).parents[1] / "README.md"
ADAPTING = README.parent / "docs" / "adapting.md"


def block(language: str, containing: str, page: Path = README) -> str:
    """The page's code block in `language` that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in blocks if containing in text)


@pytest.fixture
def own_block(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The Python example, run; the block it registers is gone again afterwards."""
    monkeypatch.setitem(_tables, "feedforward", dict(_tables["feedforward"]))
    names: dict[str, object] = {}
    exec(block("python", "@register"), names)
    return names


def test_python(own_block: dict[str, object]) -> None:
    logits = own_block["logits"]
    assert logits.shape == (1, 6, 1000) and logits.isfinite().all()
    assert own_block["model"].cost(6).flops[0] > 0


@pytest.mark.parametrize("modalities", [["text"], ["text", "image"], ["text", "image", "speech"]], ids=len)
def test_the_own_block_goes_with_any_number_of_modalities(own_block: dict[str, object], modalities: list[str]) -> None:
    config = {"modalities": modalities, "d_model": 16, "vocab_size": 50}
    layer = {"mixer": {"type": "attention", "heads": 4}, "feedforward": {"type": "relu2", "d_ff": 24}}
    model: Any = zoo.build("model", {**config, "layers": [layer, {**layer, "depth": {"type": "mod"}}]})
    modality = torch.arange(12).view(2, 6) % len(modalities)
    context = zoo.TokenContext.from_modality(modality, modalities=tuple(modalities))
    assert model(torch.randint(50, (2, 6)), context).isfinite().all()
    cost, without = model.cost(6), zoo.build("model", {**config, "layers": [layer]}).cost(6)
    assert len(cost.flops) == len(modalities) and cost.flops[0] > without.flops[0] > 2 * 2 * 16 * 24


def test_yaml(own_block: dict[str, object]) -> None:
    sections = yaml.safe_load(block("yaml", "my_blocks"))
    assert sections.pop("imports") == ["my_blocks"]
    recipe = recipes.resolve(tiny_recipe("data", "run", **sections))
    assert len(zoo.build("model", recipe.model).layers) == 8


def test_commands_name_files_that_exist() -> None:
    for path in re.findall(r"(?:tools|recipes|docs)/[\w./]+\.(?:sh|yaml|md|png)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).exists(), path


@pytest.mark.parametrize("page", [README, ADAPTING], ids=lambda page: page.stem)
def test_adapting(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a tiny LLaVA under the name that the examples use."""
    torch.manual_seed(0)
    llava().save_pretrained(tmp_path / "my_llava")
    llava_processor().save_pretrained(tmp_path / "my_llava")
    picture(0).convert("RGB").save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block("python", "za.adapt(", page), names)
    assert names["za"].adaptation(names["model"]).plan(4) == {1: 0.5, 2: 0.5}
    assert names["za"].adaptation(names["za"].load_adapted("my_llava_mod")) is not None
    if page == ADAPTING:
        assert names["za"].cache_report(names["output"].past_key_values).saved > 0


def test_methods_are_the_recipes() -> None:
    for name, shown in yaml.safe_load(block("yaml", "p_mod:", ADAPTING)).items():
        recipe = recipes.read(README.parent / "recipes" / "adapt" / f"{name}.yaml")
        assert AdaptConfig.parse(shown, name) == AdaptConfig.parse(recipe["adapt"], name)
