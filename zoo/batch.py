"""A batch: rows of the stream, as the data give them and an objective takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.context import TokenContext
from zoo.host import send


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T tokens and what the model knows about them."""

    tokens: Tensor
    """(B, T) int64; 0 in padding, and where a position carries no id the one that holds its place."""
    context: TokenContext
    content: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """What the n positions of each modality that carries no ids carry, in row and time order, as `context.index` has
    them: vectors (n, width) float32 or channels (n, count) int64."""

    sources: Tensor | None = None
    """(B,) int64, the number of the source of each row, where there are several."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        content = {name: send(values, device) for name, values in self.content.items()}
        sources = None if self.sources is None else send(self.sources, device)
        return Batch(send(self.tokens, device), self.context.to(device), content, sources)

    def under(self, **changes: Any) -> Batch:
        """The same batch whose context has another `step`, `routing` or `trace`."""
        return dataclasses.replace(self, context=self.context.replace(**changes))
