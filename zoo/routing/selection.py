"""Selection: who was taken. Of candidates by experts, as pairs; or of the tokens of rows, by a layer that others
skip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.host import send
from zoo.routing.candidates import RoutedBatch

SomeDecision = TypeVar("SomeDecision")


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertSelection:
    """R pairs of a candidate and an expert that takes it, expert by expert.

    An expert's candidates are in time order, except under expert choice: then the best score comes first.
    """

    token: Tensor
    """(R,) index into the n candidates."""
    expert: Tensor
    """(R,) expert of each pair."""
    experts: int
    """Number of experts E."""
    known: tuple[int, ...] | None = None
    """Pairs of each expert, where they do not depend on the data."""
    ends: Tensor | None = None
    """(E,) int32 on the device: where the pairs of each expert end; None where `known` says it."""

    @classmethod
    def of_index(cls, index: Tensor) -> ExpertSelection:
        """From the K candidates that each expert chose, (E, K)."""
        experts, taken = index.shape
        expert = torch.arange(experts, device=index.device).repeat_interleave(taken)
        return cls(index.reshape(-1), expert, experts, (taken,) * experts)

    @classmethod
    def of_columns(cls, chosen: Tensor, experts: int) -> ExpertSelection:
        """From the k experts that each candidate chose, (n, k)."""
        expert, order = chosen.reshape(-1).sort(stable=True)
        numbers = torch.arange(experts, device=expert.device)
        ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
        return cls(order.div(chosen.shape[1], rounding_mode="floor"), expert, experts, ends=ends)

    @classmethod
    def of_mask(cls, chosen: Tensor) -> ExpertSelection:
        """From (n, E) bool. The number of pairs depends on the data: copied to the host here, once."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        return cls(token, expert, chosen.shape[1], tuple(chosen.sum(0).tolist()))

    @property
    def counts(self) -> tuple[int, ...]:
        """Pairs of each expert, on the host. Where they depend on the data, the first to ask waits for their copy."""
        if self.known is None:
            assert self.ends is not None
            ends = self.ends.tolist()
            counts = tuple(b - a for a, b in zip([0, *ends[:-1]], ends, strict=True))
            object.__setattr__(self, "known", counts)
            return counts
        return self.known

    def sizes(self, dtype: torch.dtype) -> Tensor:
        """(E,) pairs of each expert, on the device."""
        if self.ends is None:
            return send(self.counts, self.token.device, dtype)
        return F.pad(self.ends, (1, 0)).diff().to(dtype)

    def first(self, experts: int) -> ExpertSelection:
        """The pairs of the first `experts` experts alone: those of no-op experts, which come last, are dropped. The
        host has to know how many are left."""
        if experts == self.experts:
            return self
        counts = self.counts[:experts]
        return ExpertSelection(self.token[: sum(counts)], self.expert[: sum(counts)], experts, counts)

    def mask(self, tokens: int) -> Tensor:
        """(tokens, E) bool: which expert takes which of the `tokens` candidates."""
        if self.known is not None and all(count == self.known[0] for count in self.known):
            return index_mask(self.token.view(self.experts, -1), tokens)
        chosen = torch.zeros(self.experts * tokens, dtype=torch.bool, device=self.token.device)
        return chosen.index_fill_(0, self.expert * tokens + self.token, True).view(self.experts, tokens).T

    def gather(self, values: Tensor) -> Tensor:
        """(R,): of values (n, E) those of the pairs."""
        return values.reshape(-1).index_select(0, self.token * values.shape[1] + self.expert)


@dataclasses.dataclass(frozen=True)
class TokenSelection:
    """Which of B rows of T tokens go through a layer, in time order."""

    taken: Tensor
    """(n,) bool: which of the candidates go."""
    kept: Tensor
    """(B, T) bool: the tokens that go, whether they had to compete for it or not."""
    counts: tuple[int, ...]
    """Tokens kept of each row, on the host."""
    index: Tensor
    """(B, K) columns kept, ascending. Past a row's count stand columns that are not kept."""
    valid: Tensor | None
    """(B, K) bool: what lies within a row's count; None where every row keeps K."""

    @classmethod
    def of_rows(cls, taken: Tensor, kept: Tensor, counts: tuple[int, ...], least: int = 0) -> TokenSelection:
        """From `taken`, `kept` and `counts`.

        Args:
            least: K is at least this, even where no row keeps so many.
        """
        largest = max(least, *counts)
        index = kept.logical_not().sort(dim=1, stable=True).indices[:, :largest]  # kept columns first, in time order
        valid = kept.gather(1, index) if min(counts) < largest else None
        return cls(taken, kept, counts, index, valid)

    @property
    def flat_index(self) -> Tensor:
        """(B·K,): `index` into the flat B·T tokens."""
        rows, columns = self.kept.shape
        return (self.index + torch.arange(rows, device=self.index.device)[:, None] * columns).reshape(-1)


def index_mask(index: Tensor, tokens: int) -> Tensor:
    """(E, K) indices of what each expert takes → (tokens, E) bool."""
    chosen = torch.zeros(index.shape[0], tokens, dtype=torch.bool, device=index.device)
    return chosen.scatter_(1, index, True).T


def decide(context: RoutedBatch, name: str, decision: Callable[[], SomeDecision]) -> SomeDecision:
    """The decision of block `name`: recorded in the trace, and replayed under activation checkpointing."""
    return decision() if context.trace is None else context.trace.decide(name, decision)
