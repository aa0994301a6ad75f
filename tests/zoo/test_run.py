"""A run opened from its folder alone, and what is said of a folder that is none."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from tests.pretrain.runs import tiny_recipe
from zoo.config import UserError
from zoo.kept import different, keep_modalities, open_modalities
from zoo.modalities import HuggingFace, parse_modalities

TEXTS = ["the quick brown fox", "zwölf Boxkämpfer", "", "</s> 語"]


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> Path:
    """A run of one step whose data are gone."""
    return trained_run / "run"


def test_a_run_is_whole(trained: Path) -> None:
    run, (model, recipe) = zoo.load(trained), run_folder.load_model(trained)
    assert not run.model.training and run.length == 72
    for name, value in model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], value), name
    assert list(run.modalities) == ["text", "image"] and run.vocabulary.size == recipe.model.vocab_size
    text, image = run.modalities.values()
    assert text.decode(text.encode("seven")) == "seven"
    assert image.decode(np.arange(16)).shape == (8, 8, 1)
    context = zoo.TokenContext.from_modality(torch.tensor([[0, 0]]), modalities=run.model.modalities)
    assert run.model(torch.tensor([[0, 9]]), context).shape == (1, 2, run.vocabulary.size)


def test_it_says_what_it_was_made_with(trained: Path) -> None:
    made = json.loads((trained / "environment.json").read_text())
    assert made["packages"]["torch"] == torch.__version__ and made["python"].startswith("3.")
    about = json.loads((trained / "modalities" / "about.json").read_text())
    assert about["vocabulary"]["ranges"]["text"] == [4, 304]
    assert about["modalities"]["image"]["file"] == "image.safetensors"


def broken(name: str) -> Callable[[Path], None]:
    def cut(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return cut


def other_tokenizer(run: Path) -> None:
    parse_modalities({"text": {"type": "bpe", "vocab_size": 300}})["text"].fit(TEXTS).save(run / "modalities/text.json")


def other_model(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["model"]["layers"] = recipe["model"]["layers"][:1]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def own_block(run: Path) -> None:
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("imports: []", "imports: [a_block_of_mine]")
    )


def aliases(run: Path) -> None:
    (run / "recipe.yaml").write_text("a: &a [1, 2]\nb: *a\n")


BAD = {
    "no folder": (shutil.rmtree, "recipe.yaml: does not exist; give the folder of a run"),
    "not ended": (lambda run: (run / "model.safetensors").unlink(), "model.safetensors: does not exist; it is written"),
    "cut weights": (broken("model.safetensors"), "model.safetensors: is damaged"),
    "cut recipe": (broken("recipe.yaml"), "recipe.yaml: "),
    "other model": (other_model, "model.safetensors: does not fit the recipe's model"),
    "aliases": (aliases, "recipe.yaml: cannot be read (it has aliases"),
    "other tokenizer": (other_tokenizer, "modalities: text: ids mean something else than when the run was trained"),
    "no codebook": (lambda run: (run / "modalities/image.safetensors").unlink(), "image codebook"),
    "no vocabulary": (broken("modalities/about.json"), "about.json: cannot be read"),
    "own block": (own_block, "imports: ['a_block_of_mine'] stands in the recipe of a run folder, which runs no code"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_run_is_refused(trained: Path, tmp_path: Path, what: str) -> None:
    damage, reason = BAD[what]
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    damage(run)
    with pytest.raises(UserError) as caught:
        zoo.load(run)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_modules_are_imported_where_the_user_names_them(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints"))
    own_block(run)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_block_of_mine.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert zoo.load(run, imports=["a_block_of_mine"]).length == 72
    del sys.modules["a_block_of_mine"]


def test_kinds_from_folders_are_kept_too(tmp_path: Path) -> None:
    """A tokenizer that came from a folder elsewhere, and one that needs no file."""
    parse_modalities({"text": {"type": "bpe", "vocab_size": 300}})["text"].fit(TEXTS).save(tmp_path / "tokenizer.json")
    section = parse_modalities(
        {
            "text": {"type": "huggingface", "path": str(tmp_path), "vocab_size": 320},
            "image": {"type": "continuous_patches", "image_size": 4, "patch": 2},
        }
    )
    before = {name: config.open() for name, config in section.items()}
    (tmp_path / "run").mkdir()
    keep_modalities(tmp_path / "run", before)
    (tmp_path / "tokenizer.json").unlink()
    after = open_modalities(tmp_path / "run", section)
    assert isinstance(after["text"], HuggingFace) and not different(tmp_path / "run", after)
    for text in TEXTS:
        assert np.array_equal(before["text"].encode(text), after["text"].encode(text))
    other = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "continuous_patches", "image_size": 4}})
    assert different(tmp_path / "run", {name: config.open() for name, config in other.items()}) == ["text", "image"]


def test_a_resolved_recipe_has_no_aliases(tmp_path: Path) -> None:
    """They are refused in a run folder; anchors of the user's recipe are written out."""
    shared = {"type": "dense", "d_ff": 16}
    layer = {"mixer": {"type": "attention", "heads": 2}, "feedforward": shared}
    changes = {"model": {"d_model": 32, "layers": [layer, layer]}}
    for name in ("zero_optimization", "bf16"):
        changes["deepspeed"] = {name: {"enabled": False} if name == "bf16" else {"stage": 1}}
        run_folder.write_recipe(tmp_path, recipes.resolve(tiny_recipe("data", tmp_path, **changes)), {})
        assert "&" not in (tmp_path / "recipe.yaml").read_text()
