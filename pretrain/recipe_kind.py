"""Which command a YAML file is for: told from its keys before they are checked, so that a mix-up is one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zoo.config import Config, ConfigError, suggestion


class RecipeKind(NamedTuple):
    """What a file may be the recipe of."""

    what: str
    keys: frozenset[str]
    """Keys at its top that no other kind has."""
    command: str
    """With PATH in the place of the file."""
    example: str = ""
    """A whole recipe whose `extends` names parts of this kind; empty where there are no parts."""


PRETRAINING = RecipeKind(
    "a pretraining",
    frozenset({"model", "modalities", "objective"}),
    "python -m pretrain.train PATH",
    "recipes/models/moma_4t4i_90m.yaml",
)
FINE_TUNING = RecipeKind(
    "a fine-tuning",
    frozenset({"base", "adapt", "lora", "freeze"}),
    "python -m pretrain.finetune PATH",
    "recipes/examples/digits_gamma_mod.yaml",
)
OTHERS = (
    RecipeKind("a sweep", frozenset({"arms"}), "python -m tools.sweep PATH FOLDER"),
    RecipeKind(
        "the weights of a small LLaVA",
        frozenset({"decoder"}),
        "python -m tools.examples.make_llava PATH DATA FOLDER",
    ),
)


def check_kind(data: Mapping[str, Any], path: str | Path, wanted: RecipeKind, recipe: type[Config]) -> None:
    """Refuse, in one line, what another command is for, and a part of a recipe that no command is for.

    Args:
        data: of the file, as yet unchecked.
        wanted: what the command takes.
        recipe: the config that `wanted` is parsed as. Without a name and most of what it requires, a file is a part.
    Raises:
        ConfigError: it says what kind of file it is, and what to run.
    """
    kinds = (*OTHERS, wanted, FINE_TUNING, PRETRAINING)
    found = next((kind for kind in kinds if kind.keys & data.keys()), wanted)
    if found is not wanted and ("name" in data or not found.example):
        raise ConfigError(f"{path}: is for {found.what}; run {found.command.replace('PATH', str(path))}")
    required = {name for name, field in recipe.model_fields.items() if field.is_required()}
    missing = required - data.keys()
    if found is not wanted or ("name" in missing and 2 * len(missing) > len(required)):
        raise ConfigError(
            f"{path}: is a part of the recipe of {found.what}, it has only {', '.join(map(str, data)) or 'no key'}; "
            f"name it in the `extends` of a whole one, as {found.example} does, and run "
            f"{found.command.replace('PATH', found.example)}"
        )


def nearest(path: Path) -> str:
    """`" (did you mean 'recipes/…'?)"` where a recipe of the same or of nearly this name is there, else the empty
    string."""
    known = sorted(str(file) for file in Path("recipes").rglob("*.yaml"))
    return suggestion(str(path), [file for file in known if Path(file).name == path.name] or known)
