"""The choice of backend: a name asked for and missing is an error, `auto` takes the fastest that is here and says why.

`reference.py` defines the operations; a backend is a file with the same function names.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from zoo.config import ConfigError, suggestion
from zoo.kernels import grouped, per_document, reference, sdpa

_ATTENTION: dict[str, types.ModuleType] = {"reference": reference, "sdpa": sdpa, "per_document": per_document}
_EXPERTS: dict[str, types.ModuleType] = {"reference": reference, "grouped": grouped}
_AUTO = {
    "attention": (
        "per_document",
        "no work on pairs of tokens of different documents; plain causal where a row is one document",
    ),
    "experts": ("grouped", "one batched product where experts have equally many rows"),
}
OPERATIONS: dict[str, dict[str, types.ModuleType]] = {"attention": _ATTENTION, "experts": _EXPERTS}


@dataclasses.dataclass(frozen=True)
class Choice:
    """What runs for one operation, and why."""

    operation: str
    backend: str
    reason: str

    @property
    def module(self) -> types.ModuleType:
        return OPERATIONS[self.operation][self.backend]


def choose(operation: str, asked: str = "auto") -> Choice:
    """The backend of an operation.

    Raises:
        ConfigError: the name is not known, or what was asked for does not load here.
    """
    backends = OPERATIONS[operation]
    if asked == "auto":
        name, reason = _AUTO[operation]
        return Choice(operation, name, reason)
    if asked not in backends:
        names = ["auto", *backends]
        raise ConfigError(
            f"kernels.{operation}: {asked!r} is not known; known: {', '.join(names)}{suggestion(asked, names)}"
        )
    return Choice(operation, asked, "asked for")


def check(kernels: Mapping[str, str]) -> list[Choice]:
    """Every operation's choice under the recipe's `kernels:` section.

    Raises:
        ConfigError: an operation or a backend is not known.
    """
    for operation in kernels:
        if operation not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise ConfigError(f"kernels.{operation}: unknown key; known: {known}{suggestion(operation, OPERATIONS)}")
    return [choose(operation, kernels.get(operation, "auto")) for operation in OPERATIONS]
