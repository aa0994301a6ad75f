"""The folder recipes/: what can be launched and what cannot lie apart, and the commands in headers are those of the
files."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pretrain import recipe as recipes
from pretrain.finetune import recipe as finetune_recipe

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes"
PARTS = {"adapt", "sweeps", "mixtures", "examples/llava", "models/architectures", "models/sizes"}
"""Folders of files that are not recipes: to be extended, or for other commands."""


def header_commands(path: Path) -> list[list[str]]:
    """The words of each command below `Command:` in a file's header, continued lines joined."""
    lines = [line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    after = "\n".join(lines).partition("Command:")[2].partition("Expected:")[0].replace("\\\n", " ")
    return [shlex.split(line) for line in after.splitlines() if line.lstrip().startswith(("deepspeed", "python"))]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_recipes_have_names_and_their_parts_have_none(path: Path) -> None:
    part = str(path.parent.relative_to(FOLDER)) in PARTS
    assert ("name" in recipes.read(path)) is not part
    assert part or "optimizer" in recipes.read(path)


@pytest.mark.parametrize("name", ["digits_base", "digits_frames_base"])
def test_legs_go_on_from_each_other(name: str) -> None:
    """Every leg's command loads, under the names of its results, and begins from the model of the leg before."""
    path = FOLDER / "examples" / f"{name}.yaml"
    commands = header_commands(path)
    legs = []
    for words in commands:
        assert words[4] == "pretrain.finetune" and ROOT / words[5] == path
        legs.append(finetune_recipe.load(path, words[6:]))
    assert legs[0].name == name and re.fullmatch(r"models/\w+", legs[0].base)
    assert [leg.base for leg in legs[1:]] == [f"{leg.folder}/model" for leg in legs[:-1]]
    assert len({leg.seed for leg in legs}) == len(legs), "no leg sees questions in the order of another"
    users = {recipes.read(file).get("base") for file in FOLDER.rglob("*.yaml")}
    assert f"{legs[-1].folder}/model" in users, "the last leg's model is what other recipes start from"
