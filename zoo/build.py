"""From a config, as YAML gives it, to a whole model (`build_model`), or to one block (`build_block`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import zoo.kernels
from zoo.config import Config, ConfigError
from zoo.context import TEXT_AND_IMAGE
from zoo.model import Model, ModelConfig, initialise
from zoo.recompute import Recompute
from zoo.registry import SLOTS, BlockConfig, Place, parse_block
from zoo.slots import Part

ELSEWHERE = {
    "depth": "a depth block stands round another; build the layer that has `depth:`",
    "router": "a router block stands inside another; build the block that has `router:`",
    "modality": "a modality is not part of a model; see zoo.modalities, parse_modalities makes one ready",
}
"""Slots whose blocks are not built by themselves, and what to do instead."""


@overload
def build(slot: Literal["model"], config: Mapping[str, Any] | Config, **options: Any) -> Model: ...
@overload
def build(slot: str, config: Mapping[str, Any] | Config, **options: Any) -> Any: ...
def build(slot: str, config: Mapping[str, Any] | Config, **options: Any) -> Any:
    """`build_model(config, …)` for the slot "model", else `build_block(slot, config, …)`, with the options of that
    one."""
    return build_model(config, **options) if slot == "model" else build_block(slot, config, **options)


def build_model(
    config: Mapping[str, Any] | Config,
    *,
    kernels: Mapping[str, str] | None = None,
    activation_checkpointing: Recompute = False,
    seed: int | None = 0,
) -> Model:
    """Build a whole model.

    Args:
        config: a mapping, as the section `model` of a recipe, or a validated `ModelConfig`.
        kernels: backend of each operation, see `zoo.kernels`.
        activation_checkpointing: recompute layers in the backward pass, wholly or what is cheap; see `zoo.recompute`.
        seed: first weights are a function of (seed, parameter name); None leaves them unset.
    Raises:
        ConfigError: naming the dotted key, the value, the rule and the way out.
    """
    zoo.kernels.check(kernels or {})
    model_config = ModelConfig.parse(config, "model")
    model_config.check()
    model = Model(model_config, kernels or {}, activation_checkpointing)
    if seed is not None:
        initialise(model, seed)
    return model


def build_block(
    slot: str,
    config: Mapping[str, Any] | Config,
    *,
    d_model: int = 0,
    modalities: tuple[str, ...] = TEXT_AND_IMAGE,
    name: str = "",
    norm: str = "pre",
    layers: int = 1,
    kernels: Mapping[str, str] | None = None,
    vocab_size: int = 0,
    heads: Mapping[str, BlockConfig] | None = None,
    bidirectional: tuple[str, ...] = (),
    seed: int | None = 0,
) -> Any:
    """Build one block, an instance of the slot's base (`zoo.slots`); the options say where in a model it would stand.

    Args:
        slot: `mixer`, `feedforward`, `stem`, `head` or `objective`.
        config: a mapping with `type:`, or a validated config.
        d_model: width of the stream; an objective needs none.
        name: dotted name of the block.
        norm: norm placement of the layer round it, "pre" or "post".
        layers: number of layers of the model.
        kernels: backend of each operation, see `zoo.kernels`.
        vocab_size: ids of the vocabulary; the stem and the head of ids need it.
        heads: for an objective `ModelConfig.own_heads` of the model that it trains.
        bidirectional: for an objective the modalities whose positions see all of their item.
        seed: first weights are a function of (seed, parameter name); None leaves them unset.
    Raises:
        ConfigError: naming the dotted key, the value, the rule and the way out.
    """
    zoo.kernels.check(kernels or {})
    if slot in ELSEWHERE:
        raise ConfigError(f"build: {ELSEWHERE[slot]}")
    blocks = [name for name, base in SLOTS.items() if issubclass(base, Part)]
    if slot not in blocks:
        raise ConfigError(f"build: slot {slot!r} is not known; slots: {', '.join(('model', *blocks))}")
    if d_model < 1 and slot != "objective":
        raise ConfigError(f"build: d_model is {d_model}; give the width of the stream, d_model=…")
    block_config = parse_block(slot, config, name or slot)
    place = Place(
        d_model,
        tuple(modalities),
        name,
        norm=norm,
        layers=layers,
        kernels=dict(kernels or {}),
        vocab_size=vocab_size,
        heads=dict(heads or {}),
        bidirectional=bidirectional,
    )
    block_config.check(place, name or slot)
    block = block_config.block(block_config, place)
    if seed is not None:
        initialise(block, seed)
    return block
