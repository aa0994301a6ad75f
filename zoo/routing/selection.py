"""Selection: who was taken. Of candidates by experts, as pairs; or of the tokens of rows, by a layer that others
skip."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from zoo.host import send
from zoo.routing.candidates import RoutedBatch

SomeDecision = TypeVar("SomeDecision")


@dataclasses.dataclass(frozen=True)
class ExpertSelection:
    """R pairs of a candidate and an expert that takes it, expert by expert.

    An expert's candidates are in time order, except under expert choice: then the best score comes first.
    """

    token: Tensor
    """(R,) index into the n candidates."""
    expert: Tensor
    """(R,) expert of each pair."""
    counts: tuple[int, ...]
    """Pairs of each expert, on the host."""

    @classmethod
    def of_index(cls, index: Tensor) -> ExpertSelection:
        """From the K candidates that each expert chose, (E, K)."""
        experts, taken = index.shape
        expert = torch.arange(experts, device=index.device).repeat_interleave(taken)
        return cls(index.reshape(-1), expert, (taken,) * experts)

    @classmethod
    def of_columns(cls, chosen: Tensor, experts: int) -> ExpertSelection:
        """From the k experts that each candidate chose, (n, k). The counts are copied to the host here, once."""
        expert, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).tolist()
        token = order.div(chosen.shape[1], rounding_mode="floor")
        return cls(token, expert, tuple(b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)))

    @classmethod
    def of_mask(cls, chosen: Tensor) -> ExpertSelection:
        """From (n, E) bool. The counts depend on the data: copied to the host here, once."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        return cls(token, expert, tuple(chosen.sum(0).tolist()))

    def first(self, experts: int) -> ExpertSelection:
        """The pairs of the first `experts` experts alone: those of no-op experts, which come last, are dropped."""
        if experts == len(self.counts):
            return self
        kept = sum(self.counts[:experts])
        return ExpertSelection(self.token[:kept], self.expert[:kept], self.counts[:experts])

    def mask(self, tokens: int) -> Tensor:
        """(tokens, E) bool: which expert takes which of the `tokens` candidates."""
        experts = len(self.counts)
        if len(set(self.counts)) == 1:
            return index_mask(self.token.view(experts, -1), tokens)
        chosen = torch.zeros(experts * tokens, dtype=torch.bool, device=self.token.device)
        return chosen.index_fill_(0, self.expert * tokens + self.token, True).view(experts, tokens).T

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
        valid = None
        if min(counts) < largest:
            valid = torch.arange(largest, device=kept.device) < send(counts, kept.device)[:, None]
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
