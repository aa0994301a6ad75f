"""`build`: from a config, as YAML gives it, to a block or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from torch import nn

import zoo.kernels
from zoo.config import Config, ConfigError
from zoo.model import Model, ModelConfig, initialise
from zoo.registry import SLOTS, Place, parse_block


@overload
def build(
    slot: Literal["model"],
    config: Mapping[str, Any] | Config,
    *,
    kernels: Mapping[str, str] | None = None,
    activation_checkpointing: bool = False,
    seed: int | None = 0,
) -> Model: ...


@overload
def build(
    slot: str,
    config: Mapping[str, Any] | Config,
    *,
    d_model: int = 0,
    modalities: tuple[str, ...] = ("text", "image"),
    name: str = "",
    norm: str = "pre",
    layers: int = 1,
    kernels: Mapping[str, str] | None = None,
    seed: int | None = 0,
) -> Any: ...


def build(
    slot: str,
    config: Mapping[str, Any] | Config,
    *,
    d_model: int = 0,
    modalities: tuple[str, ...] = ("text", "image"),
    name: str = "",
    norm: str = "pre",
    layers: int = 1,
    kernels: Mapping[str, str] | None = None,
    activation_checkpointing: bool = False,
    seed: int | None = 0,
) -> nn.Module:
    """Build a block (`slot` is one of `mixer`, `feedforward`, `objective`) or a whole `model`.

    Args:
        config: a mapping with `type:` (for a block), or a validated config.
        d_model, modalities, norm, layers: where a block stands; a model's config has its own.
        name: dotted name of the block.
        seed: first weights are a function of (seed, parameter name); None leaves them unset.
    Raises:
        ConfigError: naming the dotted key, the value, the rule and the way out.
    """
    zoo.kernels.check(kernels or {})
    if slot == "model":
        model_config = ModelConfig.parse(config, "model")
        model_config.check()
        built: nn.Module = Model(model_config, kernels or {}, activation_checkpointing)
    elif slot in ("depth", "router"):
        raise ConfigError(
            f"build: a {slot} block stands inside another; build the layer or the block that has `{slot}:`"
        )
    elif slot == "modality":
        raise ConfigError(
            "build: a modality is no part of a model; see zoo.modalities, parse_modalities makes one ready"
        )
    elif slot in SLOTS:
        if d_model < 1 and slot != "objective":
            raise ConfigError(f"build: d_model is {d_model}; give the width of the stream, d_model=…")
        block_config = parse_block(slot, config, name or slot)
        place = Place(d_model, tuple(modalities), name, norm=norm, layers=layers, kernels=dict(kernels or {}))
        block_config.check(place, name or slot)
        built = block_config.block(block_config, place)
    else:
        raise ConfigError(f"build: slot {slot!r} is not known; slots: {', '.join(('model', *SLOTS))}")
    if seed is not None:
        initialise(built, seed)
    return built
