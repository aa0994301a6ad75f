"""The open tables of blocks, one a slot, and the config field that looks a block up in them.

Whoever writes a block finds here what it needs: `register`, the base of its config and its place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic_core import PydanticCustomError

from zoo.config import ConfigError, explain, first_lines, shown, suggestion
from zoo.modality import Modality
from zoo.place import BlockConfig, Configured, Place  # noqa: F401  for those who write blocks
from zoo.routing.scorer import Scorer
from zoo.slots import Depth, FeedForward, Head, Mixer, Objective, Stem

SomeBlock = TypeVar("SomeBlock", bound=type[Configured])

SLOTS: dict[str, type[Configured]] = {
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
_tables: dict[str, dict[str, type[Configured]]] = {slot: {} for slot in SLOTS}


def register(slot: str, name: str) -> Callable[[SomeBlock], SomeBlock]:
    """Class decorator: `name` in `slot` means this class. The class is a subclass of the slot's base (`zoo.slots`), has
    a nested `Config(BlockConfig)`, and is built from it and its place.

    Raises:
        ConfigError: the slot does not exist, the name is taken by another class, or the class lacks base or config.
    """
    if slot not in _tables:
        raise ConfigError(f"register: slot {slot!r} is not known; slots: {', '.join(SLOTS)}")

    def add(cls: SomeBlock) -> SomeBlock:
        taken = _tables[slot].get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError(
                f"register: {slot} {name!r} is taken by {taken.__module__}.{taken.__qualname__}; choose another"
            )
        base = SLOTS[slot]
        if not issubclass(cls, base):
            raise ConfigError(
                f"register: {cls.__qualname__} does not derive from the base of the slot {slot}; write "
                f"`class {cls.__name__}({base.__module__}.{base.__name__})`"
            )
        config = cls.Config
        if config is base.Config or not issubclass(config, base.Config):
            raise ConfigError(
                f"register: {cls.__qualname__} has no nested `class Config({base.Config.__name__})`; add one"
            )
        if vars(config).get("block", cls) is not cls:  # a subclass without one of its own must not take its parent's
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


def open_slot(slot: str, base: type[Configured]) -> Any:
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
