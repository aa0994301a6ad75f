"""The config base: typed, closed, and explicit about what is wrong.

A block keeps its `Config` beside it and is built from nothing else. Every mistake a user can make becomes a
`ConfigError` whose message names the dotted key, the value, the rule and the way out.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Self

import pydantic


def printable(text: str, lines: bool = True) -> str:
    """`text` without characters that would steer a terminal: what cannot be printed is escaped.

    Args:
        lines: whether ends of lines stay.
    """
    return "".join(c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode() for c in text)


class UserError(ValueError):
    """A mistake that the user can fix. Entry points print it without a traceback and exit with 2.

    What it quotes may come from anywhere: its text is printable.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(UserError):
    """A wrong entry of a recipe or block config; the message begins with the dotted key."""


class Config(pydantic.BaseModel):
    """Base of every config: unknown keys are errors, "4" is not an integer, instances are frozen."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    largest: ClassVar[int] = 2**53
    """The largest whole number in any key, far above what can be meant; so nothing overflows, or is built for ever."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """Former name of a key → its name now, for a refusal that tells it."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def _has_no_former_names(cls, data: Any) -> Any:
        for former, name in cls.renamed.items():
            if isinstance(data, Mapping) and former in data:
                raise ValueError(f"{former} is called {name} now; write {name}: {shown(data[former])}")
        return data

    @pydantic.field_validator("*")
    @classmethod
    def _whole_numbers_fit(cls, value: Any) -> Any:
        if any(abs(number) > cls.largest for number in _integers(value)):
            raise ValueError(f"is too large; a whole number here is at most {cls.largest:,}")
        return value

    @classmethod
    def parse(cls, data: Mapping[str, Any] | Config, path: str = "") -> Self:
        """Validate `data` (a mapping as YAML gives it) into this config.

        Args:
            data: the mapping, or an instance, which is returned as it is.
            path: dotted key of `data` inside the recipe; begins every message.
        Raises:
            ConfigError: naming every wrong key, one line each.
        """
        if isinstance(data, cls):
            return data
        if not isinstance(data, Mapping):
            raise ConfigError(
                f"{path or 'the config'}: {shown(data)} is not a mapping of keys; write it as `key: value` lines"
            )
        try:
            return cls.model_validate(dict(data))
        except pydantic.ValidationError as error:
            raise ConfigError(first_lines(explain(error, path, cls))) from None


def _integers(value: Any) -> Iterator[int]:
    """Every whole number in plain data; configs inside have looked after themselves."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


def shown(value: Any) -> str:
    """A user's value as messages show it: its repr, the middle of a long one left out."""
    return _SHORT.repr(value)


PLAINER = {
    "model_type": "a mapping, written as `key: value` lines",
    "dict_type": "a mapping, written as `key: value` lines",
    "list_type": "a list, written as [one, two] or as lines that begin with a dash",
    "tuple_type": "a list, written as [one, two]",
    "string_type": "a text; quote it if it looks like something else",
}
"""What pydantic calls by Python's names, in the words of YAML; each follows "must be"."""


def dotted(path: str, location: Iterable[str | int]) -> str:
    """`("model", "layers", 1)` below `path` → `model.layers[1]`."""
    for part in location:
        if isinstance(part, int):
            path = f"{path}[{part}]"
        else:
            path = f"{path}.{part}" if path else str(part)
    return path


def suggestion(word: str, known: Iterable[str]) -> str:
    """`" (did you mean 'moma'?)"` where a known word is close, else the empty string."""
    close = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def explain(error: pydantic.ValidationError, path: str, root: type[pydantic.BaseModel]) -> str:
    """One line for each thing wrong in `error`: dotted key, value, rule, way out."""
    lines = []
    for item in error.errors(include_url=False):
        location = [part for part in item["loc"] if not (isinstance(part, str) and part.startswith("function-"))]
        key = dotted(path, location)
        if item["type"] == "extra_forbidden":
            known = _fields_at(root, location[:-1])
            known_text = f"; known: {', '.join(known)}" if known else ""
            lines.append(f"{key}: unknown key{known_text}{suggestion(str(location[-1]), known)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: this key is required; add it")
        elif item["type"] == "zoo_nested":  # a block in an open slot, see registry.py
            lines.append(explain(item["ctx"]["error"], key, item["ctx"]["root"]))
        elif item["type"] == "zoo_type":
            lines.append(f"{key}.type: {item['msg']}")
        elif item["type"] == "zoo":
            lines.append(f"{key}: {item['msg']}")
        elif item["type"] == "invalid_key":
            lines.append(f"{dotted(path, map(str, location))}: keys are words; quote it if it is meant as one")
        else:
            message = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            message = PLAINER.get(item["type"], message)
            prefix = "must be " if item["msg"].startswith("Input should be ") else ""
            value = "" if isinstance(item["input"], Mapping) else f"{shown(item['input'])}: "
            lines.append(f"{key}: {value}{prefix}{message}")
    return "\n".join(lines)


MOST_LINES = 20


def first_lines(text: str) -> str:
    """The first mistakes of a long list, a line each, and how many there are besides."""
    lines = text.splitlines()
    more = [f"… and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    return "\n".join([*lines[:MOST_LINES], *more])


def _fields_at(root: Any, location: list[str | int]) -> list[str]:
    """The keys that the config at `location` below `root` knows; empty where the path leads through open slots."""
    current = root
    for part in location:
        if isinstance(part, int):
            continue
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)
    return list(getattr(current, "model_fields", {}))
