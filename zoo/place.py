"""What a block is built from: its config, and its place in a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pydantic

from zoo.config import Config, ConfigError, suggestion
from zoo.untied import TIED, Grouping


class BlockConfig(Config):
    """Base of the configs that stand in a slot. `type` is the registered name; it is written out again on dumping."""

    type_name: ClassVar[str] = ""
    block: ClassVar[type]
    largest: ClassVar[int] = 2**18

    @pydantic.model_serializer(mode="wrap")
    def _with_type(self, handler: Callable[[Any], dict]) -> dict:
        return {"type": self.type_name, **handler(self)}

    def check(self, place: Place, path: str) -> None:
        """Raise `ConfigError` for what depends on where the block stands (widths that do not divide, modalities)."""


class Configured:
    """Base of whatever can be registered for a slot: it is built from its config."""

    Config: ClassVar[type[BlockConfig]] = BlockConfig
    """A class that is registered nests one of its own."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands in a model: everything it may know that is not its own config."""

    d_model: int
    modalities: tuple[str, ...]
    name: str = ""
    """Dotted name, as its parameters carry it."""
    norm: str = "pre"
    """Norm placement of the surrounding block: "pre" or "post"."""
    layers: int = 1
    """Number of layers of the model; the projections into the residual stream start smaller by √(2 · layers)."""
    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layer: int = 0
    """Number of the layer the block belongs to, from 0."""
    norm_grouping: Grouping = TIED
    """Which modalities share the gains of the surrounding block's norms."""
    vocab_size: int = 0
    """Ids of the vocabulary; stems and heads of ids need it."""
    heads: Mapping[str, BlockConfig] = dataclasses.field(default_factory=dict)
    """Head of each modality whose positions carry no ids; objectives need them."""
    stems: Mapping[str, BlockConfig] = dataclasses.field(default_factory=dict)
    """Stem of each modality whose positions carry no ids; objectives check them."""
    bidirectional: tuple[str, ...] = ()
    """Modalities whose positions see all of their item; objectives need them."""

    def check_modality(self, name: str, key: str) -> None:
        """Raise `ConfigError` at the dotted `key` where `name` is none of the model's modalities."""
        if name not in self.modalities:
            raise ConfigError(
                f"{key}: unknown modality; model.modalities are {', '.join(self.modalities)}"
                f"{suggestion(name, self.modalities)}"
            )

    def child(self, name: str, **changes: Any) -> Place:
        """The place of a part called `name`."""
        return dataclasses.replace(self, name=f"{self.name}.{name}" if self.name else name, **changes)
