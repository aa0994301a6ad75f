"""Pool: the tokens that compete with each other."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from zoo.context import TokenContext
from zoo.routing.candidates import Candidates

Scope = Literal["microbatch", "row"]
"""How far a competition reaches: over the whole micro-batch, or over each row by itself."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """The tokens of one modality, or of all; under `scope: row` those of each row are a pool by themselves."""

    name: str
    """What the trace calls it."""
    modality: int | None
    """None: tokens of every modality."""
    scope: Scope

    def members(self, context: TokenContext) -> Tensor:
        """(n,) flat indices into B·T, in row and time order."""
        return context.tokens if self.modality is None else context.index(self.modality)

    def row_counts(self, context: TokenContext) -> tuple[int, ...]:
        """Members of each row, on the host."""
        return context.row_counts if self.modality is None else tuple(row[self.modality] for row in context.counts)

    def candidates(self, context: TokenContext, salt: int | Tensor = 0) -> Candidates:
        """The members as candidates.

        Args:
            salt: of the block's noise, see `zoo.noise`.
        """
        counts = self.row_counts(context)
        scopes = counts if self.scope == "row" else (sum(counts),)
        even = self.scope != "row" or (self.modality is None and not context.padded)
        return Candidates(context, self.members(context), counts, scopes, even, salt)
