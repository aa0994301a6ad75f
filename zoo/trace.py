"""Trace: what the blocks of one forward tell about their routing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.routing.statistics import ExpertLoad, Load, Number, RouterHits, RoutingStatistics, Usage


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """The terms of a part of the loss, by the position that each is about."""

    losses: Tensor
    """(B, T), 0 where there is none."""
    counted: Tensor
    """(B, T) bool: where there is one."""


@dataclasses.dataclass(eq=False)
class Trace:
    """Collector for one forward: routing decisions, losses, and what routers report or learn from, by block name.

    Use a fresh one for each forward. Where activation checkpointing recomputes a layer, the layer is given a `replay`
    of the trace, so that routes cannot flip and nothing counts twice.
    """

    decisions: dict[str, Any] = dataclasses.field(default_factory=dict)
    """name → what the block decided. It holds neither this trace nor a context with it: the cycle would outlive the
    step.
    """
    losses: dict[str, tuple[Tensor, int]] = dataclasses.field(default_factory=dict)
    """name → (sum over tokens, count)."""
    statistics: RoutingStatistics = dataclasses.field(default_factory=RoutingStatistics)
    """Counts for reports, to be added over micro-batches and ranks."""
    penalties: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """name → a term of the training loss, weighted, a mean over the forward's tokens (balancing losses)."""
    updates: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """name → sums, to be added over micro-batches and ranks: what the `update` of the module of that name is given once
    an optimizer step. Tensors of any shape; the same names and shapes on every rank."""
    terms: dict[str, Terms] | None = None
    """part of the loss → its terms, before they are summed; None: nobody wants them."""
    detailed: bool = False
    """Also count which modality's tokens go to which expert; it costs time, so only evaluations ask for it."""
    replaying: bool = False
    """A replay: decisions are repeated, and what is added is dropped."""

    def decide(self, name: str, decision: Callable[[], Any]) -> Any:
        """The decision of block `name`: computed and recorded in the first pass, replayed in a recomputation."""
        if not self.replaying:
            self.decisions[name] = decision()
        return self.decisions[name]

    def add_loss(self, name: str, total: Tensor, count: int) -> None:
        if not self.replaying:
            self.losses[name] = (total, count)

    def add_hits(self, name: str, hits: RouterHits) -> None:
        if not self.replaying:
            self.statistics.hits[name] = hits

    def add_load(self, name: str, taken: int, offered: int) -> None:
        if not self.replaying:
            self.statistics.loads[name] = Load(taken, offered)

    def add_expert_load(self, name: str, rows: tuple[Number, ...]) -> None:
        if not self.replaying:
            self.statistics.expert_loads[name] = ExpertLoad(rows)

    def add_usage(self, name: str, usage: Callable[[], Usage]) -> None:
        if self.detailed and not self.replaying:
            self.statistics.usage[name] = usage()

    def add_terms(self, part: str, terms: Callable[[], Terms]) -> None:
        if self.terms is not None:
            self.terms[part] = terms()

    def add_penalty(self, name: str, value: Tensor) -> None:
        if not self.replaying:
            self.penalties[name] = value

    def add_update(self, name: str, sums: dict[str, Tensor]) -> None:
        if not self.replaying:
            self.updates[name] = {key: value.detach() for key, value in sums.items()}

    def replay(self) -> Trace:
        """A trace with the same decisions, for computing a layer once more: it repeats them and takes nothing in."""
        return Trace(decisions=self.decisions, replaying=True)
