"""AdaptConfig: how a multimodal LLM becomes one with Mixture-of-Depths layers; the slots that the methods fill.

γ-MoD (arXiv 2410.13859), p-MoD (arXiv 2412.04449) and VideoLLM-MoD (arXiv 2408.16730) are points of this space, written
in `recipes/adapt/`; any other combination that can be written works.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from zoo.config import Config, ConfigError
from zoo.routing.capacity import Capacity, number
from zoo.schedules import OverLayers


class Layers(Config):
    """Which layers are routed, for a decoder of any depth."""

    first: int = Field(1, ge=1)
    """The first routed layer. Layer 0 always stays dense."""
    leave_last: int = Field(0, ge=0)
    """How many of the last layers stay dense."""
    every: int = Field(1, ge=1)
    """1: each layer from `first` on; 2: alternate ones."""


class Constant(Config):
    """Every routed layer has the same capacity."""

    renamed: ClassVar[Mapping[str, str]] = {"keep": "value"}
    type: Literal["constant"] = "constant"
    value: Capacity
    """The capacity: share of a group's tokens that is kept, 1 − the skip ratio of the γ-MoD paper."""


class Progressive(Config):
    """Progressive ratio decay: ½ cos(π i / (L − 1)) + centre in layer i of L (p-MoD's PRD, written for 32 layers)."""

    type: Literal["progressive"]
    centre: float | str = 0.5
    """R: the ratio half-way, and the mean over all layers where nothing is clipped."""
    dense_above: Capacity = 0.85
    """A layer whose ratio is above this stays dense."""
    floor: Capacity = 0.15
    """No layer keeps less."""

    def of(self, layer: int, layers: int) -> Fraction:
        """Capacity of `layer` of `layers`; 1 where it is dense."""
        centre, half = number(self.centre), Fraction(1, 2)
        curve = OverLayers(
            type="cosine", first=str(centre + half), last=str(centre - half), dense_above=self.dense_above
        )
        return curve.capacity(layer, layers, number(self.floor))


class PerLayer(Config):
    """A capacity for each routed layer, in the order of `layers`."""

    renamed: ClassVar[Mapping[str, str]] = {"keep": "values"}
    type: Literal["list"]
    values: list[Capacity]
    """The capacities: share of each group that is kept, a number a layer."""


class RouterConfig(Config):
    """What decides which tokens go through a routed layer."""

    type: Literal["linear", "attention", "random"] = "linear"
    """What scores the candidates. "linear": a learned router. Without weights, as baselines that need no training:
    "attention": what the last token of the prompt attends to, mean over heads, in the layer before the first routed
    one (FastV, arXiv 2403.06764, which routes every layer from there on, by one decision); "random": a draw of each
    layer, by the token's place and, in training, by the sample's ids."""
    seed: int = 0
    """Seed of random draws."""
    shared: bool = False
    """One router for all layers (γ-MoD); else one each."""
    input: Literal["norm", "residual"] = "residual"
    """What it reads: the layer's normed input (γ-MoD) or the residual stream as it is (p-MoD)."""
    bias: bool = False
    """Whether its linear map has a bias."""
    initial_scale: float = Field(0.1, ge=0)
    """Standard deviation of the first weights in units of 1/√D; 0 starts at zero, where all tokens tie and the earlier
    ones of a group are kept (p-MoD)."""

    @property
    def learned(self) -> bool:
        return self.type == "linear"

    @pydantic.model_validator(mode="after")
    def _options_of_their_type(self) -> RouterConfig:
        own = {"linear": {"shared", "input", "bias", "initial_scale"}, "random": {"seed"}, "attention": set()}
        for name, field in type(self).model_fields.items():
            if name not in own[self.type] | {"type"} and getattr(self, name) != field.default:
                raise ValueError(f"{name} has no meaning under type {self.type!r}; leave it out")
        return self


class GateConfig(Config):
    """How a token's score weighs what the layer does to it: the path on which the router learns."""

    activation: Literal["softmax", "tanh", "sigmoid", "none"] = "softmax"
    """"softmax": the second of two outputs' probabilities (γ-MoD); "tanh": 1 + tanh_scale · tanh(logit) (p-MoD);
    "none": 1, the router then learns from its auxiliary loss alone."""
    tanh_scale: float | None = Field(None, gt=0)
    """Default 0.2, p-MoD's."""
    branch: Literal["mlp", "block"] = "mlp"
    """"mlp": x̃ + g · MLP(x̃), x̃ the stream after attention, as γ-MoD and p-MoD are published; "block":
    x + g · (layer(x) − x)."""
    symmetric: bool = False
    """Multiply the skipped candidates by g too (p-MoD)."""
    tokens: Literal["candidates", "all"] = "candidates"
    """"all": also weigh tokens that are always kept, generated ones too (γ-MoD's code)."""

    @pydantic.model_validator(mode="after")
    def _scale_of_tanh_alone(self) -> GateConfig:
        if self.tanh_scale is not None and self.activation != "tanh":
            raise ValueError(
                f"tanh_scale has no meaning under activation {self.activation!r}; leave it out or choose tanh"
            )
        return self


class AuxiliaryConfig(Config):
    """A loss that teaches the router besides the language loss."""

    type: Literal["membership", "none"] = "none"
    """"membership": cross-entropy between the router's probability and having been chosen, over the candidates, mean in
    each layer, summed over layers (γ-MoD)."""
    weight: float = Field(0.01, gt=0)
    """Weight of that loss beside the language loss."""


class InferenceConfig(Config):
    """How tokens are chosen outside training. It depends on what a token is, never on whether it comes from a cache."""

    rule: Literal["topk", "threshold"] = "topk"
    """For image tokens: the top-k of their group as in training, or a keep-probability σ(logit) above `threshold`."""
    threshold: float | None = Field(None, gt=0, lt=1)
    """The least keep-probability; required where one of the rules uses it, absent where none does."""
    text: Literal["keep", "threshold"] = "keep"
    """For all other tokens, of prompt and answer, in prefill and generation alike."""

    @pydantic.model_validator(mode="after")
    def _threshold_where_used(self) -> InferenceConfig:
        used = "threshold" in (self.rule, self.text)
        if used != (self.threshold is not None):
            raise ValueError(
                "rule or text is threshold: give the threshold, such as 0.5"
                if used
                else "a threshold is given but nothing uses it; set rule or text to threshold, or leave it out"
            )
        return self


class AdaptConfig(Config):
    """Everything `zoo.adapt.adapt` needs to know besides the model."""

    layers: Annotated[
        Annotated[list[int], Tag("list")] | Annotated[Layers, Tag("rule")],
        Discriminator(lambda value: "rule" if isinstance(value, (Mapping, Layers)) else "list"),
    ]
    """Numbers of the routed layers from 0, ascending, as `tools.arank` proposes them; or a rule for any depth, of which
    a progressive capacity leaves some dense."""
    last_layer: bool = False
    """Whether the last layer may be routed. What it does to image tokens reaches no text token, so its router gets
    next to no gradient from the language loss (p-MoD routes it)."""
    candidates: Literal["image", "image_and_answer", "video"] = "image"
    """Tokens that may be skipped. "image": those of images and of video frames; "image_and_answer": those and, in
    training, the tokens with a label; "video": those of video frames alone."""
    group: Literal["image", "frame", "sample"] = "image"
    """Tokens that compete: those of one image (or video), of one frame (or image), or all of a sample. Answer tokens
    compete with images under "sample", otherwise with the sample's other answer tokens."""
    capacity: Annotated[Constant | Progressive | PerLayer, Field(discriminator="type")]
    """How much of its candidates each routed layer keeps."""
    router: RouterConfig = RouterConfig()
    gate: GateConfig = GateConfig()
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    inference: InferenceConfig = InferenceConfig()

    @pydantic.field_validator("layers")
    @classmethod
    def _layers(cls, value: list[int] | Layers) -> list[int] | Layers:
        if isinstance(value, list):
            if not value:
                raise ValueError("no layer is named; list at least one")
            if 0 in value:
                raise ValueError(
                    "layer 0 stays dense: before any mixing equal tokens have equal scores, and it alone holds keys "
                    "and values of every token; leave it out"
                )
            if min(value) < 0:
                raise ValueError("layers are counted from 0 upwards; write the layer's number, not one from the end")
            if sorted(set(value)) != value:
                raise ValueError("write each layer once, in ascending order")
        return value

    @pydantic.model_validator(mode="after")
    def _learns(self) -> AdaptConfig:
        if not self.router.learned:
            self._without_weights()
        elif self.gate.activation == "none" and self.auxiliary.type == "none":
            raise ValueError(
                "gate.activation and auxiliary.type are both none, so that no router learns; choose one of them"
            )
        if isinstance(self.capacity, PerLayer):
            if not isinstance(self.layers, list) or len(self.layers) != len(self.capacity.values):
                raise ValueError("capacity.values needs as many entries as layers, and layers as a list")
        return self

    def _without_weights(self) -> None:
        wanted = (
            ("gate.activation", self.gate.activation, "none"),
            ("auxiliary.type", self.auxiliary.type, "none"),
            ("inference.rule", self.inference.rule, "topk"),
            ("inference.text", self.inference.text, "keep"),
        )
        for key, value, needed in wanted:
            if value != needed:
                raise ValueError(
                    f"{key} is {value}, but a router of type {self.router.type} has ranks, no weights or "
                    f"probabilities; set {key}: {needed}"
                )

    def plan(self, depth: int) -> dict[int, Fraction]:
        """Capacity of the routed layers of a decoder of `depth` layers, by layer number.

        Raises:
            ConfigError: a layer out of range, the last one unasked, or nothing left to route.
        """
        if isinstance(self.layers, list):
            numbers = self.layers
            if numbers[-1] >= depth:
                raise ConfigError(
                    f"layers: {numbers[-1]} is out of range; the decoder has layers 0 to {depth - 1}; leave it out, or "
                    "give a rule that fits any depth: {first: 1, leave_last: 1}"
                )
        else:
            numbers = list(range(self.layers.first, depth - self.layers.leave_last, self.layers.every))
        if isinstance(self.capacity, Progressive):
            plan = {i: self.capacity.of(i, depth) for i in numbers}
            plan = {i: capacity for i, capacity in plan.items() if capacity < 1}
        elif isinstance(self.capacity, PerLayer):
            plan = {i: number(value) for i, value in zip(numbers, self.capacity.values, strict=True)}
        else:
            plan = dict.fromkeys(numbers, number(self.capacity.value))
        if not plan:
            raise ConfigError(f"layers: no layer of {depth} is left to route; lower first, leave_last or dense_above")
        if depth - 1 in plan and not self.last_layer and self.router.learned:
            raise ConfigError(
                f"layers: {depth - 1} is the last layer, whose router gets next to no gradient from the language loss; "
                "leave it out (leave_last: 1), or set last_layer: true"
            )
        return plan
