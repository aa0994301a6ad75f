"""Recipes: every one that is shipped, overrides, `extends`, numbers, the resolved copy, what may change on resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from pretrain import recipe as recipes
from tests.pretrain.runs import ROOT, tiny_recipe
from zoo.config import ConfigError

FOLDERS = (".", "tiny", "models", "ablations")
SHIPPED = sorted(path for folder in FOLDERS for path in (ROOT / "recipes" / folder).glob("*.yaml"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe("data", "run")))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_shipped_recipes(path: Path) -> None:
    """Each loads, says what it shows and how it is run, builds, has a finite cost, and fits 1 and 2 ranks."""
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert "What it shows:" in head and "Command:" in head
    recipe = recipes.load(path, ["data.path=elsewhere"])
    assert recipe.data.path == "elsewhere"
    with torch.device("meta"):
        model: Any = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)
    cost = model.cost(recipe.data.sequence_length)
    assert all(math.isfinite(value) and value > 0 for value in cost.flops + cost.active)
    for world in (1, 2):
        recipes.launch_config(recipe, world)
    assert recipes.resolve(recipe.dump()) == recipe


def test_overrides(file: Path) -> None:
    recipe = recipes.load(
        file,
        [
            "train.steps=7",
            "optimizer.lr=1e-4",
            "model.layers.1.dropout=0.5",
            "model.layers[0].mixer.heads=4",
            "objective.weights.text=2",
            "data.validation=null",
            "seed=3",
            "model.layers.0.mixer.qk_norm=true",
            "deepspeed.zero_optimization.stage=3",
            "name=other",
            "modalities.image={type: patches, image_size: 8, patch: 4}",
        ],
    )
    assert (recipe.train.steps, recipe.optimizer.lr, recipe.seed, recipe.name) == (7, 1e-4, 3, "other")
    assert recipe.model.layers[1].dropout == 0.5
    mixer: Any = recipe.model.layers[0].mixer
    assert mixer.heads == 4 and mixer.qk_norm is True
    assert recipe.data.validation is None
    assert recipe.modalities["image"].patch == 4  # type: ignore[attr-defined]
    assert recipe.objective.weights == {"text": 2.0}  # type: ignore[attr-defined]
    assert isinstance(recipe.deepspeed, dict) and recipe.deepspeed["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", "0.0001", "+1e-4"])
def test_numbers_with_exponents(file: Path, text: str) -> None:
    assert recipes.load(file, [f"optimizer.lr={text}"]).optimizer.lr == 1e-4


@pytest.mark.parametrize("text", ["'1e-4'", "1e-4x", "e-4"])
def test_words_are_no_numbers(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer.lr: .* must be a valid number"):
        recipes.load(file, [f"optimizer.lr={text}"])


def test_extends(file: Path) -> None:
    child = file.with_name("child.yaml")
    child.write_text(
        """
        extends: recipe.yaml
        name: child
        optimizer: {weight_decay: 0.2}
        objective: {z_loss: 0.0}
        schedule: {type: cosine}
        modalities: {text: {type: bpe, vocab_size: 300}}
        model:
          layers: [{mixer: {type: attention, heads: 1}}]
        """
    )
    grandchild = file.with_name("grandchild.yaml")
    grandchild.write_text("extends: child.yaml\nseed: 9\n")
    recipe = recipes.load(grandchild, ["train.clip=0"])
    assert (recipe.name, recipe.seed, recipe.train.clip) == ("child", 9, 0)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (1e-2, 0.2), "sections are laid over each other"
    assert len(recipe.model.layers) == 1, "lists are replaced whole"
    assert recipe.modalities["text"].type_name == "bpe" and list(recipe.modalities) == ["text", "image"]


def test_the_modality_of_text_may_have_any_name_and_stands_first(tmp_path: Path) -> None:
    written = tiny_recipe("data", "run")
    kinds = written["modalities"]
    written["modalities"] = {"text": kinds["image"], "caption": kinds["text"]}
    experts = {"type": "moma", "experts": {"text": 2, "caption": 2}, "d_ff": 16}
    written["model"]["layers"] = [layer | {"feedforward": experts} for layer in written["model"]["layers"]]
    recipe = recipes.resolve(written)
    assert list(recipe.modalities) == recipe.model.modalities == ["caption", "text"]
    assert recipes.resolve(recipe.dump()) == recipe


def test_keys_over_a_list_are_laid_over_each_of_its_entries(tmp_path: Path) -> None:
    """So that a size says for all layers of an architecture how wide they are, and the order of files decides."""
    (tmp_path / "pair.yaml").write_text("layers: [{mixer: {type: mamba}}, {mixer: {type: attention, heads: 1}}]")
    (tmp_path / "size.yaml").write_text("{layers: {mixer: {heads: 2}}, sizes: {a: 1}}")
    (tmp_path / "both.yaml").write_text("extends: [pair.yaml, size.yaml]")
    (tmp_path / "swapped.yaml").write_text("extends: [size.yaml, pair.yaml]\nsizes: [1, 2]")
    mamba, attention = {"mixer": {"type": "mamba", "heads": 2}}, {"mixer": {"type": "attention", "heads": 2}}
    assert recipes.read(tmp_path / "both.yaml") == {"layers": [mamba, attention], "sizes": {"a": 1}}
    assert recipes.read(tmp_path / "swapped.yaml")["layers"][1] == {"mixer": {"type": "attention", "heads": 1}}
    assert recipes.read(tmp_path / "swapped.yaml", over={"sizes": {"a": 1}})["sizes"] == {"a": 1}, "not of mappings"
    assert (
        recipes.read(tmp_path / "pair.yaml", over={"layers": {"mixer": {"type": "moe"}}})["layers"]
        == [{"mixer": {"type": "moe"}}] * 2
    ), "a block of another type is replaced"


def test_a_block_of_another_type_replaces_the_whole_block(file: Path) -> None:
    merged = recipes.read(file, over={"schedule": {"type": "cosine"}, "optimizer": {"type": "adamw"}})
    assert merged["schedule"] == {"type": "cosine"}, "decay_steps belongs to wsd"


def test_dump_and_parse(file: Path) -> None:
    recipe = recipes.load(file)
    text = yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True)
    again = file.with_name("again.yaml")
    again.write_text(text)
    assert recipes.load(again) == recipe
    assert recipes.differences(yaml.safe_load(text), recipe.dump()) == []


def test_relative_run_folder(file: Path) -> None:
    assert recipes.load(file, ["run_dir=null"]).folder == Path("runs/tiny")
    assert recipes.load(file, ["run_dir=some/where"]).folder == Path("some/where")


def test_what_may_change_on_resuming(file: Path) -> None:
    old = recipes.load(file).dump()

    def changed(*overrides: str) -> list[str]:
        return recipes.differences(old, recipes.load(file, overrides).dump())

    allowed = ["steps=99", "log_every=7", "evaluate_every=1", "checkpoint_every=2", "keep_checkpoints=9"]
    allowed = [f"train.{text}" for text in [*allowed, "max_bad_steps=1"]]
    assert changed(*allowed, "evaluate.rows=1", "kernels.attention=reference", "run_dir=moved") == []
    assert changed("seed=1") == ["seed: 0 there, 1 here"]
    lines = changed("model.layers.1.depth.capacity=0.25", "objective.weights.text=2.0", "train.global_batch=8")
    assert lines == [
        "model.layers[1].depth.capacity: 0.5 there, 0.25 here",
        "objective.weights: {} there, '(absent)' here",
        "objective.weights.text: '(absent)' there, 2.0 here",
        "train.global_batch: 4 there, 8 here",
    ]
    assert "model.layers[2].norm: '(absent)' there, 'pre' here" in recipes.differences(
        old,
        recipes.resolve(
            tiny_recipe("data", "run", model={"layers": [{"mixer": {"type": "attention", "heads": 2}}] * 3})
        ).dump(),
    )


BEYOND = {
    "an integer that is none": ("seed=!!int x", "seed: '!!int x' is not valid YAML; quote it .no valid int"),
    "a date that is none": ("seed=!!timestamp 2024-02-30", "no valid timestamp"),
    "64 bits": ("seed=18446744073709551616", "a number of more than 64 bits"),
    "digits": ("seed=" + "9" * 5000, "seed: '999999"),
    "53 bits": ("seed=9007199254740993", "seed: 9007199254740993: is too large; a whole number here is at most 9,007,"),
    "width": ("model.d_model=1000000000000000000", "model.d_model: 1000000000000000000: must be less than or equal to"),
    "experts": (
        "model.layers.0.feedforward.experts.text=1000000000",
        "feedforward.experts: is too large; a whole number",
    ),
    "repeats": ("model.repeat=1000000000", "model: has 2,000,000,000 layers, repeats written out; at most 1,024"),
    "codes": ("modalities.image.codes=16000000000", "modalities.image.codes: 16000000000: is too large"),
    "a type that is a list": ("model.layers.0.mixer.type=[1]", r"model.layers\[0\].mixer.type: \[1\] is not known"),
    "a kind that is a list": ("modalities.image.type=[1]", r"modalities.image.type: \[1\] is not known"),
    "a name of a thousand letters": ("name=" + "x" * 1000, "must be letters, .*, 200 at most"),
    "open brackets": ("name=[[[", r"name: '\[\[\[' is not valid YAML; quote it"),
    "many open brackets": ("name=" + "[" * 5000, "nested too deeply"),
    "brackets": ("name=" + "[" * 60 + "]" * 60, "nested too deeply to be a recipe; values may lie 50 deep"),
    "a module that exits": ("imports=[tests.pretrain.exits]", "cannot be imported .SystemExit: 3, .*exits.py line 5"),
}


@pytest.mark.parametrize("override, message", BEYOND.values(), ids=BEYOND)
def test_beyond_all_bounds(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        recipes.load(file, [override])
    assert len(str(refused.value)) < 1000


def test_many_mistakes_are_counted(file: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        recipes.load(file, over={"model": {"layers": [1] * 5000}})
    lines = str(refused.value).splitlines()
    assert len(lines) == 21 and lines[-1] == "… and 4,980 more"


def test_a_date_is_a_text(file: Path) -> None:
    assert recipes.load(file, ["name=2024-02-30"]).name == "2024-02-30"


def test_aliases_that_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    merged = ["a0: &a0 {" + ", ".join(f"k{i}: 1" for i in range(10)) + "}"]
    merged += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)]
    (tmp_path / "merged.yaml").write_text("\n".join(merged))
    (tmp_path / "merged circle.yaml").write_text("a: &a {<<: *a}")
    (tmp_path / "circle.yaml").write_text("a: &a [*a]")
    (tmp_path / "large.yaml").write_text("name: " + "x" * (1 << 20))
    for name, message in (
        ("bomb", "too many values; at most 100,000"),
        ("merged", "too many values; at most 100,000"),
        ("merged circle", "too deeply"),
        ("circle", "too deeply"),
        ("large", "larger than"),
    ):
        with pytest.raises(ConfigError, match=message):
            recipes.read(tmp_path / f"{name}.yaml")


def test_nothing_steers_the_terminal(file: Path) -> None:
    """Keys, values, names and paths may hold any character; what is said of them holds none that acts."""
    file.write_text(file.read_text() + '"\\e[2J\\u202e\\a": 1\n')
    for overrides, said in (
        ([], r"\x1b[2J\u202e\x07: unknown key"),
        (["train.device='\x1b]0;title\x07'"], r"train.device: "),
        (["train.device.\x1b[2J=1"], r"train.device.\x1b[2J"),
    ):
        with pytest.raises(ConfigError) as refused:
            recipes.load(file, overrides)
        lines = str(refused.value).splitlines()
        assert any(said in line for line in lines) and all(line.isprintable() for line in lines), lines


@pytest.mark.parametrize(
    "text", [" " * (1 << 20) + "{}", "[" * 100_000, '{"steps_per_print": 1' + "0" * 400 + "}", "9" * 5000, "null"]
)
def test_json_beyond_all_bounds(file: Path, text: str) -> None:
    (file.parent / "deepspeed.json").write_text(text)
    with pytest.raises(ConfigError, match=r"deepspeed: '.*deepspeed\.json'") as refused:
        recipes.launch_config(recipes.load(file, [f"deepspeed={file.parent / 'deepspeed.json'}"]), 1)
    assert len(str(refused.value)) < 1000
