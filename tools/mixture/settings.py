"""What the YAML of a choice of mixtures says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from pretrain.recipe_file import merge
from zoo.config import Config, ConfigError, suggestion

Weights = dict[str, float]
"""Weights of the sources in a mixture, by name, of sum 1."""


class MixtureConfig(Config):
    """A choice among mixtures of a recipe's sources."""

    recipe: str
    """YAML file of a pretraining with several `data.sources`, relative to this one. Its `train.steps` are those of each
    run after the start."""
    over: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe for all runs."""
    start_steps: int = Field(gt=0)
    """Steps of the run that all others go on from; it sees the sources by the weights of the recipe. Merging needs
    a start that has left its first weights behind."""
    parts: int = Field(4, gt=1)
    """Mixtures are all whose weights are multiples of 1 / parts."""
    check: list[dict[str, float]] = Field(default_factory=list)
    """Mixtures that are really trained on, by weights of their sources; a source that is left out has none."""
    judge: dict[str, float] = Field(default_factory=dict)
    """Weight of each source's validation loss in what mixtures are ranked by; default: all alike."""
    accelerators: int = Field(1, gt=0)
    """Ranks of each run: deepspeed --num_accelerators."""

    def base(self) -> dict[str, Any]:
        """The recipe's data that all runs share."""
        return merge(recipes.read(self.recipe), self.over)


def read(path: Path, overrides: Iterable[str] = ()) -> MixtureConfig:
    """Read and validate a file; the recipe of the result is a path that can be opened.

    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    config = MixtureConfig.parse(recipes.read(path, overrides))
    config = config.model_copy(update={"recipe": str(path.parent / config.recipe)})
    recipe = recipes.resolve(config.base())
    names = sources(recipe)
    for key, said in (("judge", config.judge), *((f"check[{i}]", each) for i, each in enumerate(config.check))):
        for name, weight in said.items():
            if name not in names:
                raise ConfigError(f"{key}.{name}: is no source; they are {', '.join(names)}{suggestion(name, names)}")
            if weight < 0:
                raise ConfigError(f"{key}.{name}: {weight} is negative; a weight is 0 or more")
    for i, each in enumerate(config.check):
        if sum(weight > 0 for weight in each.values()) < 2:
            raise ConfigError(
                f"check[{i}]: {each} has one source; its merge is the run itself, so it checks nothing; name a mixture"
            )
    return config


def sources(recipe: Recipe) -> list[str]:
    """Names of the recipe's sources.

    Raises:
        ConfigError: it has one, or one of them holds nothing out.
    """
    found = recipe.data.sources or {}
    if len(found) < 2:
        raise ConfigError("data.sources: a mixture is chosen among two sources or more; name them")
    if recipe.data.token_ratio is not None:
        raise ConfigError("data.token_ratio: sets the weights of the sources, which are what is chosen; remove it")
    return list(found)


def normal(weights: Weights, names: Iterable[str]) -> Weights:
    """The weights of all sources, of sum 1."""
    total = sum(weights.values())
    return {name: weights.get(name, 0.0) / total for name in names}
