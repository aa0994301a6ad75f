"""The `modalities:` section of a recipe: the modalities of a run by name, in order."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import pydantic
from pydantic_core import PydanticCustomError

from zoo.carries import Ids
from zoo.config import ConfigError, explain
from zoo.modalities.text import Bytes
from zoo.modalities.vocabulary import Vocabulary
from zoo.modality import ModalityConfig
from zoo.registry import BlockConfig, ModalitySlot, config_of, known

TEXT = "text"
"""Type of the parts of a document that a kind of text reads; by default its name too."""


def _check(modalities: dict[str, BlockConfig]) -> dict[str, BlockConfig]:
    names = list(modalities)
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise _wrong(f"{name!r} is not a name of a modality; use lower-case letters, digits and '_'")
    if not any(map(_reads_text, modalities.values())):
        raise _wrong(
            f"has {', '.join(names) or 'none'}, but no kind of text, which the markers between parts are of; write "
            "`text: {type: bytes}` first"
        )
    reader: dict[str, str] = {}
    for name, config in modalities.items():
        other = reader.setdefault(_part(config), name)
        if other != name:
            raise _wrong(f"{other} and {name} both read the {_part(config)} parts of a document; keep one of them")
    return {name: modalities[name] for name in in_order(modalities)}


def in_order(modalities: Mapping[str, Any]) -> list[str]:
    """Names of modalities in the order of the model: that of text first, the others as they are written.

    Args:
        modalities: name → config, or what a recipe says of it, right or wrong.
    """
    return sorted(map(str, modalities), key=lambda name: not _reads_text(modalities.get(name)))


def _reads_text(modality: Any) -> bool:
    """Whether a modality, a config or what a recipe says of it, is a kind of text."""
    if isinstance(modality, ModalityConfig):
        return modality.part == TEXT
    kind = modality.get("type") if isinstance(modality, Mapping) else None
    config = config_of("modality", kind) if kind in known("modality") else BlockConfig
    return issubclass(config, ModalityConfig) and config.part == TEXT


def _part(config: BlockConfig) -> str:
    assert isinstance(config, ModalityConfig)
    return config.part


def _wrong(text: str) -> PydanticCustomError:
    return PydanticCustomError("zoo", "{text}", {"text": text})


ModalitiesSection = Annotated[dict[str, ModalitySlot], pydantic.AfterValidator(_check)]
"""Name → config, that of text first wherever it is written; a name stands wherever a recipe speaks of a modality."""

Modalities = Mapping[str, ModalityConfig]


def default_modalities() -> dict[str, ModalityConfig]:
    """Text alone, as bytes."""
    return {TEXT: Bytes.Config()}


def parse_modalities(data: Mapping[str, Any], path: str = "modalities") -> dict[str, ModalityConfig]:
    """Validate a section.

    Raises:
        ConfigError: naming every wrong key below `path`.
    """
    try:
        return pydantic.TypeAdapter(ModalitiesSection).validate_python(dict(data))  # type: ignore[return-value]
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, path, BlockConfig)) from None


def vocabulary(modalities: Modalities) -> Vocabulary:
    """The id space of `modalities`. One whose positions carry no ids gets a single id, which holds their places."""
    carried = {name: config.carries for name, config in modalities.items()}
    sizes = {name: each.size if isinstance(each, Ids) else 1 for name, each in carried.items()}
    return Vocabulary(sizes, next(name for name, config in modalities.items() if _reads_text(config)))
