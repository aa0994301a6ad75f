"""The items of a modality in the token stream, and what their positions carry where that is not an id.

The stream holds a token for every position, also where a position carries a vector or channels: the id that holds the
place. What it carries lies in an array beside the tokens, one row a position, in the order of the stream. It is written
when a shard is tokenised and mapped into memory afterwards, like the tokens, so that a row of the stream costs one
look-up and gives the same numbers on every rank, after every restart. It costs 4 bytes a number of disk for vectors, 1
or 2 for channels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from zoo.carries import Carries, Channels, Ids, Vectors


def stored(carries: Carries) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Type and shape of what one position carries, as it is kept on disk; None for ids, which are tokens."""
    match carries:
        case Ids():
            return None
        case Vectors(width):
            return np.dtype(np.float32), (width,)
        case Channels(count, size):
            return np.min_scalar_type(size - 1), (count,)


@dataclasses.dataclass(frozen=True)
class Items:
    """The items of one modality in all shards of a split."""

    spans: np.ndarray
    """(i, 2) int64, ascending: [start, stop) of the positions of each item in the whole, markers apart."""
    bidirectional: bool
    """A position sees all of its item."""
    content: Sequence[np.ndarray] = ()
    """What the positions carry, one row each, an array a shard; none where they carry ids."""

    @functools.cached_property
    def before(self) -> np.ndarray:
        """(i + 1,) positions of the items before each."""
        return np.concatenate([[0], np.cumsum(self.spans[:, 1] - self.spans[:, 0])])

    @functools.cached_property
    def shard_starts(self) -> np.ndarray:
        """(shards + 1,) positions in the shards before each."""
        return np.concatenate([[0], np.cumsum([len(content) for content in self.content])])

    def inside(self, start: int, stop: int) -> np.ndarray:
        """(k, 2) spans of the items in [start, stop) of the whole, which cuts none."""
        return self.spans[slice(*np.searchsorted(self.spans[:, 0], [start, stop]))]

    def carried(self, start: int, stop: int) -> np.ndarray:
        """(n, …) what the n positions of the items in [start, stop) carry; the stretch lies inside one document."""
        first, last = self.before[np.searchsorted(self.spans[:, 0], [start, stop])].tolist()
        shard = int(np.searchsorted(self.shard_starts, first, side="right")) - 1
        shard = min(shard, len(self.content) - 1)
        offset = int(self.shard_starts[shard])
        return self.content[shard][first - offset : last - offset]
