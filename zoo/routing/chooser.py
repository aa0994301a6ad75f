"""Choosers: from scores to a selection.

Expert choice lets every expert, or the one layer that may be skipped, take the best of a pool; it looks at the future.
Token choice and a threshold decide token by token.
Sources: expert choice (arXiv 2202.09368), MoMa (arXiv 2407.21770 §2.2), Mixture-of-Depths (arXiv 2404.02258 §3).
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from zoo.host import send
from zoo.routing.candidates import Candidates
from zoo.routing.capacity import capacity_count
from zoo.routing.selection import ExpertSelection, index_mask


class Chooser:
    """Base of choosers. It holds no weights; a subclass gives `mask`, and overrides the rest where it differs."""

    looks_ahead: ClassVar[bool] = False
    """Whether what happens to a token depends on other tokens: then causal use needs an auxiliary router."""

    capacity: Fraction | None
    """Share of its candidates that an expert is meant to get; None where that is left open."""

    def mask(self, scores: Tensor, candidates: Candidates) -> Tensor:
        """Scores (n, E), without gradient → (n, E) bool, who is taken. Ties go to the earlier token."""
        raise NotImplementedError(f"{type(self).__name__} has no mask(scores, candidates)")

    def choose(self, scores: Tensor, candidates: Candidates) -> ExpertSelection:
        """The same as pairs, with counts known on the host."""
        return ExpertSelection.of_mask(self.mask(scores, candidates))

    def weigh(self, gates: Tensor, selection: ExpertSelection) -> Tensor:
        """(R,) weight of every pair, from the scorer's gates (n, E). Routers learn through it."""
        return selection.gather(gates)


@dataclasses.dataclass(frozen=True)
class ExpertChoice(Chooser):
    """Each expert takes its top-k of every scope, k = ⌈candidates · capacity⌉ in exact arithmetic."""

    capacity: Fraction  # pyrefly: ignore[bad-override]  # a field, not a variable that anybody sets
    looks_ahead: ClassVar[bool] = True

    def mask(self, scores: Tensor, candidates: Candidates) -> Tensor:
        return index_mask(self.index(scores, candidates), scores.shape[0])

    def choose(self, scores: Tensor, candidates: Candidates) -> ExpertSelection:
        return ExpertSelection.of_index(self.index(scores, candidates))

    def index(self, scores: Tensor, candidates: Candidates) -> Tensor:
        """(E, K) candidates that each expert takes, scope after scope, in each the best first."""
        scopes, capacity = candidates.scopes, self.capacity
        if candidates.even:
            order = scores.unflatten(0, (len(scopes), scopes[0])).sort(dim=1, descending=True, stable=True).indices
            best = order[:, : capacity_count(scopes[0], capacity)]
            if len(scopes) > 1:
                best = best + torch.arange(0, scores.shape[0], scopes[0], device=scores.device)[:, None, None]
            return best.flatten(0, 1).T
        order = scores.sort(dim=0, descending=True, stable=True).indices  # (n, E)

        def scope_of() -> Tensor:
            return send(torch.cat([torch.full((n,), number) for number, n in enumerate(scopes)]), scores.device)

        def places() -> Tensor:
            starts = [sum(scopes[:i]) for i in range(len(scopes))]
            taken = [torch.arange(s, s + capacity_count(n, capacity)) for s, n in zip(starts, scopes, strict=True)]
            return send(torch.cat(taken), scores.device)

        scope = candidates.context.constant(("scope of", scopes), scope_of)
        taken = candidates.context.constant(("best of", scopes, capacity), places)
        by_scope = scope[order].sort(dim=0, stable=True).indices  # best first inside each scope
        return order.gather(0, by_scope).index_select(0, taken).T


@dataclasses.dataclass(frozen=True)
class TokenChoice(Chooser):
    """Each token takes its k best experts; of equal ones the lower."""

    top_k: int
    experts: int
    """No-op experts included."""
    normalise: bool = False
    """Divide a token's weights by their sum over the experts it chose."""

    @property
    def capacity(self) -> Fraction:  # pyrefly: ignore[bad-override]
        return Fraction(self.top_k, self.experts)

    def columns(self, scores: Tensor) -> Tensor:
        """(n, k) experts of each token, the best first."""
        if self.top_k == 1:
            return scores.argmax(1, keepdim=True)
        return scores.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]

    def mask(self, scores: Tensor, candidates: Candidates) -> Tensor:
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, self.columns(scores), True)

    def choose(self, scores: Tensor, candidates: Candidates) -> ExpertSelection:
        return ExpertSelection.of_columns(self.columns(scores), self.experts)

    def weigh(self, gates: Tensor, selection: ExpertSelection) -> Tensor:
        weight = selection.gather(gates)
        if not self.normalise:
            return weight
        total = torch.zeros_like(gates[:, 0]).index_add(0, selection.token, weight)
        return weight / total.index_select(0, selection.token).clamp_min(torch.finfo(weight.dtype).tiny)


@dataclasses.dataclass(frozen=True)
class Threshold(Chooser):
    """Whatever scores above a threshold is taken: how auxiliary routers decide in causal use."""

    above: float = 0.0
    capacity: ClassVar[None] = None  # pyrefly: ignore[bad-override]

    def mask(self, scores: Tensor, candidates: Candidates) -> Tensor:
        return scores > self.above
