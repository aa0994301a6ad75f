"""What the YAML of a sweep over pretrainings says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from zoo.config import Config, ConfigError, suggestion

Over = dict[str, Any]
"""Keys of a recipe, laid over another's as `extends` does it."""
Tolerance = Annotated[float, Field(ge=0, lt=1)]


Matched = Literal["flops", "active", "total"]


class BeginConfig(Config):
    """A smaller model that is trained first, and from whose weights the arm's then starts; see `tools.upcycle`."""

    share: float = Field(gt=0, lt=1)
    """Share of `train.steps` that it is trained for; the arm's own model gets the rest."""
    over: Over = Field(default_factory=dict)
    """Laid over the arm's recipe: what makes it the smaller one."""


class ArmConfig(Config):
    """One way to pretrain; without any key it is the sweep's recipe as it stands."""

    over: Over = Field(default_factory=dict)
    """Laid over the sweep's recipe."""
    sizes: dict[str, Over] = Field(default_factory=dict)
    """Laid over that at a size, by its name, after what the size says itself."""
    begin: BeginConfig | None = None
    """Train a smaller model first, and start from it."""
    routers: Over | None = None
    """Train the causal routers alone afterwards, as `tools.train_routers` does, with these keys of its recipe over
    its own, such as `train: {steps: 100}`; null: no such stage."""
    unmatched: dict[Matched, str] = Field(default_factory=dict)
    """Keys of the sweep's `match` that this arm need not meet, each with the reason; the table shows it."""


class MatchConfig(Config):
    """What of an arm must be that of the baseline at the same size, and how nearly: a relative difference each. What is
    left out may differ. Main and auxiliary routers are left out of all three."""

    like: str | None = None
    """The arm that others must match; default: the baseline."""
    flops: Tolerance | None = None
    """FLOPs a token, of each modality; under `steps: flops` those of the whole training."""
    active: Tolerance | None = None
    """Parameters that a token meets, of each modality."""
    total: Tolerance | None = None
    """Parameters of the whole model."""

    @pydantic.model_validator(mode="after")
    def _something(self) -> MatchConfig:
        if self.flops is None and self.active is None and self.total is None:
            raise ValueError("says nothing; give flops, active or total a tolerance, such as flops: 0.02")
        return self


class SweepConfig(Config):
    """A whole sweep."""

    recipe: str
    """YAML file of a pretraining, relative to the sweep's: what all arms share."""
    over: Over = Field(default_factory=dict)
    """Laid over the recipe for all arms."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """What is compared, by name."""
    baseline: str | None = None
    """The arm that others are compared with; default: the first."""
    compare: dict[str, str] = Field(default_factory=dict)
    """Arms whose difference in loss from another arm than the baseline is shown as well, such as moma: ec."""
    sizes: dict[str, Over] = Field(default_factory=lambda: {"one": {}}, min_length=1)
    """Laid over every arm's recipe, by the size's name; each arm is run at each of them."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    """Every arm and size is run with each of them: first weights, order of the data, dropout. Arms of a seed see the
    same documents in the same order."""
    match: MatchConfig
    steps: Literal["tokens", "flops"] = "tokens"
    """"tokens": all arms take the steps of their recipe. "flops": an arm takes as many as cost what the baseline's
    training costs, so that a cheaper model sees more tokens."""
    vary: list[Literal["data", "modalities"]] = Field(default_factory=list)
    """Sections in which arms may differ though they make another order or another meaning of the data."""
    accelerators: int = Field(1, gt=0)
    """Ranks of each run: deepspeed --num_accelerators."""
    jobs: int = Field(1, gt=0)
    """Runs side by side."""
    keep_models: bool = False
    """Keep weights and checkpoints of every run, not its figures alone."""

    @pydantic.field_validator("arms", "sizes")
    @classmethod
    def _names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not name.replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"{name!r}: a name must be letters, digits, '_' and '.'; it names folders")
        return named

    @pydantic.field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("names a seed twice; each is run once")
        return seeds

    @pydantic.model_validator(mode="after")
    def _known(self) -> SweepConfig:
        named = [(f"compare.{arm}", name) for arm, name in self.compare.items()]
        named += [("compare", arm) for arm in self.compare]
        for key, name in (("baseline", self.baseline), ("match.like", self.match.like), *named):
            if name is not None and name not in self.arms:
                raise ValueError(
                    f"{key} {name!r} is no arm; give one of {', '.join(self.arms)}{suggestion(name, self.arms)}"
                )
        for name, arm in self.arms.items():
            for key in arm.unmatched:
                if getattr(self.match, key) is None:
                    raise ValueError(f"arms.{name}.unmatched.{key}: match.{key} asks for nothing; remove it")
            for size in arm.sizes:
                if size not in self.sizes:
                    raise ValueError(f"arms.{name}.sizes.{size} is no size; give one of {', '.join(self.sizes)}")
        return self

    @property
    def base_arm(self) -> str:
        """The name of the baseline."""
        return next(iter(self.arms)) if self.baseline is None else self.baseline

    @property
    def like(self) -> str:
        """The name of the arm that others must match."""
        return self.match.like or self.base_arm


def parse(data: Mapping[str, Any], folder: Path) -> SweepConfig:
    """Validate what a sweep's file in `folder` says; the recipe of the result is a path that can be opened.

    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    sweep = SweepConfig.parse(data)
    path = folder / sweep.recipe
    if not path.is_file():
        raise ConfigError(f"recipe: {sweep.recipe!r} is not a file beside the sweep's ({path}); correct the path")
    return sweep.model_copy(update={"recipe": str(path)})
