"""A file that another command takes, a part of a recipe, a path that has moved: one line each, with what to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import recipe
from pretrain.finetune import recipe as finetune_recipe
from pretrain.recipe_kind import FINE_TUNING, OTHERS, PRETRAINING, nearest
from tests.pretrain.runs import ROOT
from zoo.config import ConfigError

LOADS = {"pretrain.train": recipe.load, "pretrain.finetune": finetune_recipe.load}
WHOLE = "python -m pretrain.finetune recipes/examples/digits_gamma_mod.yaml"


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", LOADS)
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("recipes/adapt/gamma_mod.yaml", f"part of the recipe of a fine-tuning, it has only adapt; .* run {WHOLE}"),
        ("recipes/models/sizes/90m.yaml", "part of the recipe of a pretraining, it has only model, train; "),
        ("recipes/sweeps/digits.yaml", "for a sweep; run python -m tools.sweep recipes/sweeps/digits.yaml FOLDER"),
        ("recipes/examples/llava/digits.yaml", "for the weights of a small LLaVA; run python -m tools.examples.make_l"),
    ],
)
def test_no_command_takes_parts_or_files_of_others(command: str, file: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{file}: is a? ?{message}") as refused:
        LOADS[command](file)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "file", "right"),
    [
        ("pretrain.train", "recipes/examples/digits_tuning.yaml", "pretrain.finetune"),
        ("pretrain.finetune", "recipes/quickstart.yaml", "pretrain.train"),
    ],
)
def test_each_command_names_the_other(command: str, file: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"; run python -m {right} {file}$"):
        LOADS[command](file)
    assert LOADS[right](file).name


def test_what_messages_name_is_there() -> None:
    for kind in (PRETRAINING, FINE_TUNING):
        assert LOADS[kind.command.split()[2]](kind.example).name
    for kind in OTHERS:
        module = kind.command.split()[2].replace(".", "/")
        assert (ROOT / module / "__main__.py").is_file() or (ROOT / f"{module}.py").is_file()


def test_a_recipe_without_a_name_is_told_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: {ROOT}/recipes/quickstart.yaml\nname: null\n")
    with pytest.raises(ConfigError, match="^name: None"):
        recipe.load(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipes/adapt/digits_p_mod.yaml", "recipes/examples/digits_p_mod.yaml"),
        ("recipes/adapt/llava_digits.yaml", "recipes/examples/llava/digits.yaml"),
        ("recipes/adapt/sweep_photos.yaml", "recipes/sweeps/photos.yaml"),
        ("recipes/quikstart.yaml", "recipes/quickstart.yaml"),
    ],
)
def test_a_missing_file_names_the_nearest_recipe(old: str, new: str) -> None:
    assert nearest(Path(old)) == f" (did you mean {new!r}?)"
    with pytest.raises(ConfigError, match=rf"^{old}: cannot be read .*did you mean '{new}'"):
        recipe.load(old)


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    assert nearest(Path("/elsewhere/absent.yaml")) == ""
