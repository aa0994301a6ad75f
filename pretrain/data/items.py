"""The tokens of one shard, the items of each modality in them, and what positions carry that carry no id.

The stream holds a token for every position, also where a position carries a vector or channels: the id that holds the
place. What it carries lies in an array beside the tokens, one row a position, in the order of the stream. It is written
when a shard is tokenised and mapped into memory afterwards, like the tokens, so that a row of the stream costs one
look-up and gives the same numbers on every rank, after every restart. It costs 4 bytes a number of disk for vectors, 1
or 2 for channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from zoo.carries import Carries, Channels, Ids, Vectors

Form = tuple[np.dtype, tuple[int, ...]]
"""Type and shape of what one position carries, as it is kept on disk."""


def stored(carries: Carries) -> Form | None:
    """The form of what a position carries; None for ids, which are tokens."""
    match carries:
        case Ids():
            return None
        case Vectors(width):
            return np.dtype(np.float32), (width,)
        case Channels(count, size):
            return np.min_scalar_type(size - 1), (count,)


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of one modality in a shard, in their order.

    Attributes:
        table: (3, i) int64, for each item its first position in the tokens and the one after its last, markers apart,
            and the number of positions in the items before it.
    """

    table: np.ndarray

    def inside(self, start: int, stop: int) -> np.ndarray:
        """(3, k) those in the tokens [start, stop), which cut none."""
        first, last = np.searchsorted(self.table[0], (start, stop)).tolist()
        return self.table[:, first:last]

    def positions(self, start: int, stop: int) -> slice:
        """Which positions of the modality, counted in the shard, are those in the tokens [start, stop)."""
        found = self.inside(start, stop)
        if not found.shape[1]:
            return slice(0, 0)
        first, last = int(found[2, 0]), int(found[2, -1] + found[1, -1] - found[0, -1])
        return slice(first, last)


@dataclasses.dataclass(frozen=True)
class ShardTokens:
    """The usable documents of a shard as one array of tokens; arrays are mapped from disk."""

    tokens: np.ndarray
    """(n,) int32: all documents one after the other."""
    starts: np.ndarray
    """(d + 1,) int64: document i is tokens[starts[i] : starts[i + 1]]."""
    text_bytes: np.ndarray
    """(d,) int64: UTF-8 bytes of the texts of each document."""
    items: Mapping[str, Items]
    """The items of each modality that has any, of which none is ever cut."""
    content: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the positions carry of each modality that carries no ids, (n, …), one row a position."""

    def spans(self) -> np.ndarray:
        """(s, 2) int64, ascending: [start, stop) in the tokens of all items with their markers."""
        tables = [np.stack([items.table[0] - 1, items.table[1] + 1], 1) for items in self.items.values()]
        spans = np.concatenate([np.zeros((0, 2), np.int64), *tables])
        return spans[np.argsort(spans[:, 0])]
