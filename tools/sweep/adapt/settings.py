"""What a sweep's YAML says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pydantic
from pydantic import Field

from zoo.config import Config, ConfigError

Target = Annotated[float, Field(gt=0, lt=1)]


class ArmConfig(Config):
    """One way to make the base cheaper; without any key it is the control: the base, tuned as it is."""

    recipe: str | None = None
    """YAML file, relative to the sweep's, whose `adapt` section this arm takes."""
    adapt: dict[str, Any] = Field(default_factory=dict)
    """Keys of an `adapt` section, laid over the recipe's."""
    layers: Literal["recipe", "all", "every_second", "alternate", "random", "arank", "arank_high"] = "recipe"
    """Which layers are routed. "recipe": those of `adapt`; "all" that may be; "every_second" of them, where that does
    not reach the target all. The others take as few as let each have `min_capacity`: "alternate" spreads them evenly,
    "random" draws them for each seed, "arank" takes the lowest ARank, "arank_high" the highest."""
    tokens: Literal["learned", "random", "attention"] = "learned"
    """What ranks a layer's tokens: routers as in `adapt`, a draw for each seed, or FastV's attention scores."""
    train: bool = True
    """Whether the adapted model is tuned before it is judged."""
    solve: Literal["value", "centre"] = "value"
    """The key of `adapt.capacity` that is set so that the target is met."""

    @property
    def dense(self) -> bool:
        return self.recipe is None and not self.adapt

    @pydantic.model_validator(mode="after")
    def _fits(self) -> ArmConfig:
        if self.dense and (self.layers, self.tokens, self.train, self.solve) != ("recipe", "learned", True, "value"):
            raise ValueError(
                "without recipe and adapt an arm is the dense control, which has no other keys; give adapt"
            )
        if self.tokens == "learned" and not self.train:
            raise ValueError("learned routers that are not trained rank at random; set train: true, or tokens: random")
        if self.tokens == "attention" and self.train:
            raise ValueError(
                "FastV ranks by a prompt's last token, and a training sample ends in its answer; set train: false"
            )
        if self.solve == "centre" and self.layers != "recipe":
            raise ValueError(
                "solve: centre goes with layers: recipe; a progressive capacity says itself which are dense"
            )
        return self


class TestConfig(Config):
    """Questions that models are judged by, and how."""

    __test__ = False
    metric: Literal["accuracy", "perplexity"] = "accuracy"
    """"accuracy" of answers that are generated, or "perplexity" of the right ones."""
    split: str = "test"
    """Name of the file of questions, without .jsonl."""
    samples: int | None = Field(None, gt=0)
    """How many questions, from the beginning of the split; null: all."""
    before: int | None = Field(None, gt=0)
    """How many of them are asked before tuning too; null: all of `samples`."""
    batch: int = Field(32, gt=0)
    """Questions a forward pass."""

    @pydantic.model_serializer(mode="wrap")
    def _dumped(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a metric that is the default: folders of sweeps from before there was a choice stay what they are."""
        return {key: value for key, value in dump(self).items() if (key, value) != ("metric", "accuracy")}


class ThresholdConfig(Config):
    """How a threshold is tuned to the target."""

    split: str = "validation"
    """The questions it is tuned on."""
    samples: int = Field(64, gt=0)
    """Prompts, each of other images."""
    rounds: int = Field(12, gt=2)
    """At most so many passes over them."""


class ArankConfig(Config):
    """Options of `tools.arank`, measured once on the base."""

    split: str = "validation"
    """The questions it is measured on."""
    samples: int = Field(50, gt=0)
    """How many of them, drawn at random."""
    batch: int = Field(8, gt=0)
    """Samples a forward pass."""
    seed: int = Field(0, ge=0)
    """Seed of the draw."""
    rtol: float = Field(1e-2, gt=0, lt=1)
    """Singular values below this share of the largest count as zero."""
    heads: int | None = Field(None, gt=0)
    """Heads of each layer to look at, evenly spread; null: all."""
    rows: Literal["all", "image"] = "all"
    """Whose attention is ranked: that of all tokens, or that of image tokens alone."""


class TimingConfig(Config):
    """How prefill and decode are timed, dense and sparse in turn."""

    batch: int = Field(8, gt=0)
    """Prompts a forward pass."""
    rounds: int = Field(7, ge=5)
    """Samples of each time; medians are reported."""


class SweepConfig(Config):
    """A whole sweep."""

    renamed: ClassVar[Mapping[str, str]] = {"min_keep": "min_capacity"}
    base: str
    """Folder of the dense model."""
    data: str
    """Folder of questions, with train, validation and test."""
    recipe: str
    """YAML file, relative to the sweep's: the fine-tuning that all arms get; its `base`, `data.path` and `adapt` are
    the sweep's."""
    optimizer: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe's `optimizer` section."""
    schedule: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe's `schedule` section."""
    train: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe's `train` section."""
    evaluate: dict[str, Any] = Field(default_factory=dict)
    """Laid over the recipe's `evaluate` section."""
    targets: list[Target] = Field(min_length=1)
    """Decoder FLOPs of a test prompt over those of the dense model."""
    tolerance: float = Field(0.02, gt=0, lt=0.5)
    """How far, relative to it, an arm may be from a target."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], min_length=1)
    """Every arm is run with each of them."""
    min_capacity: float = Field(0.1, gt=0, lt=1)
    """The least capacity of a layer, where fewer layers would do."""
    last_layer: bool = False
    """Whether arms may route the last layer, those with a learned router only under an auxiliary loss."""
    arms: dict[str, ArmConfig] = Field(min_length=1)
    """The ways to adapt, by name."""
    jobs: int = Field(1, gt=0)
    """Runs side by side."""
    keep_models: bool = False
    """Keep the model of every run, not its figures alone."""
    test: TestConfig = TestConfig()
    threshold: ThresholdConfig = ThresholdConfig()
    arank: ArankConfig = ArankConfig()
    timing: TimingConfig = TimingConfig()

    @pydantic.field_validator("arms")
    @classmethod
    def _names(cls, arms: dict[str, ArmConfig]) -> dict[str, ArmConfig]:
        for name in arms:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"{name!r}: the name of an arm must be letters, digits and '_'; it names folders")
        if sum(arm.dense for arm in arms.values()) > 1:
            raise ValueError("two arms have neither recipe nor adapt; one dense control is enough")
        return arms


FREE = {"arms", "targets", "seeds", "jobs", "keep_models", "timing"}
"""Keys that may change between two calls for one folder; what a finished run depends on is kept with it."""


def parse(data: Mapping[str, Any], folder: Path) -> SweepConfig:
    """Validate what a sweep's file in `folder` says; recipes of the result are paths that can be opened.

    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    sweep = SweepConfig.parse(data)
    arms = {}
    for name, arm in sweep.arms.items():
        arms[name] = arm if arm.recipe is None else arm.model_copy(update={"recipe": str(folder / arm.recipe)})
    for key, place in (("base", sweep.base), ("data", sweep.data)):
        if not Path(place).is_dir():
            raise ConfigError(f"{key}: {place!r} is not a folder; give one that exists")
    return sweep.model_copy(update={"recipe": str(folder / sweep.recipe), "arms": arms})
