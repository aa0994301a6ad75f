"""The open tables of blocks, one a slot, and the config field that looks a block up in them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic_core import PydanticCustomError

from zoo.config import Config, ConfigError, explain, first_lines, shown, suggestion
from zoo.routing.scorer import Scorer
from zoo.slots import Depth, FeedForward, Head, Mixer, Modality, Objective, Stem
from zoo.untied import TIED, Grouping

SLOTS: dict[str, type] = {
    "mixer": Mixer,
    "feedforward": FeedForward,
    "depth": Depth,
    "router": Scorer,
    "stem": Stem,
    "head": Head,
    "objective": Objective,
    "modality": Modality,
}
"""The slots, and the base of what stands in each. `open_slot` adds those of other packages."""
_tables: dict[str, dict[str, type]] = {slot: {} for slot in SLOTS}


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


def register(slot: str, name: str) -> Callable[[type], type]:
    """Class decorator: `name` in `slot` means this class. The class is a subclass of the slot's base (`zoo.slots`), has
    a nested `Config(BlockConfig)`, and is built from it and its place.

    Raises:
        ConfigError: the slot does not exist, the name is taken by another class, or the class lacks base or config.
    """
    if slot not in _tables:
        raise ConfigError(f"register: slot {slot!r} is not known; slots: {', '.join(SLOTS)}")

    def add(cls: type) -> type:
        taken = _tables[slot].get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"register: {slot} {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another"
            )
        config = getattr(cls, "Config", None)
        if not (isinstance(config, type) and issubclass(config, BlockConfig)):
            raise ConfigError(f"register: {cls.__qualname__} has no nested `class Config(BlockConfig)`; add one")
        base = SLOTS[slot]
        if not issubclass(cls, base):
            raise ConfigError(
                f"register: {cls.__qualname__} does not derive from the base of the slot {slot}; write "
                f"`class {cls.__name__}({base.__module__}.{base.__name__})`"
            )
        if (
            vars(config).get("block", cls) is not cls
        ):  # a subclass without a Config of its own must not take its parent's
            config = cls.Config = type(config)("Config", (config,), {"__module__": cls.__module__})
        config.type_name, config.block = name, cls
        _tables[slot][name] = cls
        return cls

    return add


def known(slot: str) -> list[str]:
    """Names registered in a slot, in order of registration."""
    return list(_tables[slot])


def config_of(slot: str, name: str) -> type[BlockConfig]:
    """The config of the block that is registered under a name."""
    return _tables[slot][name].Config


def resolve(slot: str, value: Any) -> BlockConfig:
    """The config a mapping with `type:` stands for.

    Raises:
        pydantic.ValidationError or PydanticCustomError: for `zoo.config.explain`, which adds the dotted path.
    """
    if isinstance(value, BlockConfig):
        if _tables[slot].get(value.type_name) is not value.block:
            text = f"{value.type_name!r} is not known in slot {slot}; known: {', '.join(known(slot))}"
            raise PydanticCustomError("zoo", "{text}", {"text": text})
        return value
    if not isinstance(value, Mapping):
        raise PydanticCustomError("zoo", "{text}", {"text": f"{shown(value)} is not a block; write {{type: …}}"})
    options = dict(value)
    name = options.pop("type", None)
    if not isinstance(name, str) or name not in _tables[slot]:
        wrong = "this key is required" if name is None else f"{shown(name)} is not known"
        text = f"{wrong}; known: {', '.join(known(slot))}{suggestion(str(name), known(slot))}"
        raise PydanticCustomError("zoo_type", "{text}", {"text": text})
    try:
        return _tables[slot][name].Config.model_validate(options)
    except pydantic.ValidationError as error:
        raise PydanticCustomError(
            "zoo_nested", "nested", {"error": error, "root": _tables[slot][name].Config}
        ) from None


def _field(slot: str) -> Any:
    return Annotated[pydantic.SerializeAsAny[BlockConfig], pydantic.BeforeValidator(functools.partial(resolve, slot))]


MixerSlot = _field("mixer")
FeedForwardSlot = _field("feedforward")
DepthSlot = _field("depth")
RouterSlot = _field("router")
StemSlot = _field("stem")
HeadSlot = _field("head")
ObjectiveSlot = _field("objective")
ModalitySlot = _field("modality")


def open_slot(slot: str, base: type) -> Any:
    """Add a slot for what a package other than `zoo` looks up by name, such as its data sources.

    Args:
        base: what is registered for the slot derives from it.
    Returns:
        the type of a config's field that holds a block of the slot.
    Raises:
        ConfigError: the slot has another base already.
    """
    if SLOTS.setdefault(slot, base) is not base:
        raise ConfigError(f"open_slot: slot {slot!r} has the base {SLOTS[slot].__qualname__} already; choose another")
    _tables.setdefault(slot, {})
    return _field(slot)


def parse_block(slot: str, value: Any, path: str) -> BlockConfig:
    """A block's validated config.

    Raises:
        ConfigError: naming every wrong key below `path`.
    """
    try:
        return pydantic.TypeAdapter(_field(slot)).validate_python(value)
    except pydantic.ValidationError as error:
        raise ConfigError(first_lines(explain(error, path, BlockConfig))) from None
