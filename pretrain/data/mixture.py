"""Several sources as one stream of rows: which row of which source stands where is arithmetic, and not state.

Rows come in blocks of 65,536, in each of which a source has the same number of rows, its weight's share. Row i of the k
that a source has in a block lies at random in the i-th of the block's k equal stretches; so any stretch of the stream,
such as the rows of one rank in one step, has each source's share to within a few rows. What a source gives are the
rows of its own stream, in order. Hence the row at a position is a function of (seed, position) and of the sources, the
number of ranks does not matter, and a counter is all that resuming needs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.data.errors import DataError
from pretrain.data.packing import Row, TokenStream
from pretrain.data.shuffle import Shuffle
from zoo.modalities import Vocabulary

BLOCK = 1 << 16
"""Rows of a block. A weight can be met to 1 / 65,536."""


class Mixture:
    """Rows of several streams by weight, for ever. Those of a single one are its own rows.

    Args:
        streams: the sources by name, all of one vocabulary and one length.
        weights: of each, relative to each other.
        seed: of the order of the sources; None: 0.
    Raises:
        DataError: a weight is too small to be met.
    """

    def __init__(self, streams: Mapping[str, TokenStream], weights: Mapping[str, float], seed: int | None) -> None:
        self.streams = dict(streams)
        self.seed = seed or 0
        self.rows_per_block = apportion([weights[name] for name in streams], BLOCK)
        """(S,) rows of each source in a block."""
        for name, rows in zip(streams, self.rows_per_block.tolist(), strict=True):
            if not rows:
                raise DataError(
                    f"data.sources.{name}.weight: {weights[name]:g}: is less than one row of {BLOCK:,}; raise it, or "
                    "remove the source"
                )
        self._block = functools.lru_cache(maxsize=4)(self._make_block)

    @property
    def _any(self) -> TokenStream:
        return next(iter(self.streams.values()))

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that its tokens are from."""
        return self._any.vocabulary

    @property
    def sequence_length(self) -> int:
        """T, tokens of a row."""
        return self._any.sequence_length

    @property
    def shares(self) -> dict[str, float]:
        """Share of the rows that each source has."""
        return dict(zip(self.streams, (self.rows_per_block / BLOCK).tolist(), strict=True))

    @functools.cached_property
    def rows_per_epoch(self) -> int:
        """Rows before the first source begins anew."""
        if len(self.streams) == 1:
            return self._any.rows_per_epoch
        ends = []
        for source, stream in enumerate(self.streams.values()):
            block, row = divmod(stream.rows_per_epoch, int(self.rows_per_block[source]))
            ends.append(block * BLOCK + int(np.flatnonzero(self._block(block)[0] == source)[row]))
        return min(ends)

    def row(self, number: int) -> Row:
        """Global row `number` ≥ 0."""
        stream, row = self.place(number)
        return stream.row(row)

    def counts(self, number: int) -> np.ndarray:
        """(M,) int64: tokens of each modality in a row, known without reading it."""
        stream, row = self.place(number)
        return stream.counts(row)

    def text_bytes(self, rows: range) -> float:
        """UTF-8 bytes of the texts in some rows, whatever they are tokenised by. Exact for whole documents."""
        return sum(stream.text_bytes(row) for stream, row in map(self.place, rows))

    def documents_of_row(self, number: int) -> np.ndarray:
        """(pieces,) int64: the number of the document that each piece in a row is from, in their order; counted over
        all sources."""
        stream, row = self.place(number)
        earlier = itertools.takewhile(lambda each: each is not stream, self.streams.values())
        return stream.documents_of_row(row) + sum(len(each.documents) for each in earlier)

    def padding_row(self) -> Row:
        """A row of nothing but padding."""
        return self._any.padding_row()

    def place(self, number: int) -> tuple[TokenStream, int]:
        """The stream that a row comes from, and which of its rows it is."""
        if len(self.streams) == 1:
            return self._any, number
        block, inside = divmod(number, BLOCK)
        sources, rows = self._block(block)
        source = int(sources[inside])
        return list(self.streams.values())[source], block * int(self.rows_per_block[source]) + int(rows[inside])

    def source(self, number: int) -> int:
        """The number of the source that a row comes from, in the order of `streams`."""
        block, inside = divmod(number, BLOCK)
        return 0 if len(self.streams) == 1 else int(self._block(block)[0][inside])

    def rows_before(self, number: int) -> dict[str, int]:
        """How many of the rows before row `number` come from each source."""
        block, inside = divmod(number, BLOCK)
        counts = block * self.rows_per_block
        if len(self.streams) == 1:
            counts = np.array([number])
        elif inside:
            counts = counts + np.bincount(self._block(block)[0][:inside], minlength=len(counts))
        return dict(zip(self.streams, counts.tolist(), strict=True))

    def epochs(self, number: int) -> dict[str, float]:
        """How often each source has been gone through before row `number`."""
        before = self.rows_before(number)
        return {name: before[name] / stream.rows_per_epoch for name, stream in self.streams.items()}

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) the source of each row of a block, and (BLOCK,) how many of the source stand before it there."""
        sources, rows, places = [], [], []
        for source, count in enumerate(self.rows_per_block.tolist()):
            number = np.arange(count, dtype=np.uint64)
            jitter = Shuffle.of(self.seed, block * len(self.streams) + source).keys(number).astype(np.uint64)
            # in whole numbers, which are the same on every machine: (i + u) / k of the block, u in [0, 1)
            places.append((((number << np.uint64(32)) | jitter) << np.uint64(15)) // np.uint64(count))
            sources.append(np.full(count, source, np.int32))
            rows.append(number.astype(np.int32))
        order = np.argsort(np.concatenate(places), kind="stable")
        return np.concatenate(sources)[order], np.concatenate(rows)[order]


def apportion(weights: Sequence[float], seats: int) -> np.ndarray:
    """(n,) int64 of the sum `seats`, in proportion to `weights` (n,): rounded down, and what is left to those that
    lose most, the earlier ones first."""
    wanted = np.array(weights, np.float64) / sum(weights) * seats
    given = np.floor(wanted).astype(np.int64)
    given[np.argsort(given - wanted, kind="stable")[: seats - int(given.sum())]] += 1
    return given
