"""Candidates: the tokens of pools, with what a router may know about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from zoo.trace import Trace


class RoutedBatch(Protocol):
    """What every router may ask of the context of B rows of T tokens. `TokenContext` offers it, and much more."""

    @property
    def key(self) -> Tensor | None:
        """B·T int32 numbers, identities of the tokens for counter-based noise (`zoo.noise`)."""

    @property
    def trace(self) -> Trace | None:
        """Where decisions and losses are reported."""

    def shared(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A value that depends on the context alone: computed by the first layer that asks, kept for the others."""

    def constant(self, name: Any, compute: Callable[[], Any]) -> Any:
        """A value that depends on its name alone, such as a table of numbers that the host knows; as `shared`."""


@dataclasses.dataclass(frozen=True)
class Candidates:
    """n tokens that may be chosen."""

    context: RoutedBatch
    """Context of the whole batch."""
    index: Tensor
    """(n,) flat indices into B·T; the tokens of a pool stand together, in row and time order."""
    row_counts: tuple[int, ...]
    """Candidates of each row, on the host."""
    scopes: tuple[int, ...]
    """How many candidates compete with each other, on the host: the first so many, the next so many, and so on."""
    even: bool = False
    """All scopes are known to be of the same size."""
    salt: int | Tensor = 0
    """Salt of this layer's noise at this step (`zoo.noise`)."""

    @property
    def key(self) -> Tensor:
        """(n,) int32, identities of the candidates for counter-based noise."""
        assert self.context.key is not None, "this batch has no noise"
        return self.context.key.reshape(-1).index_select(0, self.index)
