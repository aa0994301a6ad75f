"""Packing: documents of any length into rows of T tokens, in an order that is arithmetic and not state.

1. *Cut.* A document longer than T becomes pieces of at most T tokens; a cut never falls inside an image. A
   piece is a document of its own to the model: it sees no other piece, and positions count from its first
   token, so they stay below T. Every token of every document is in exactly one piece.
2. *Fill.* Pieces, in a scattered order, each go to the fullest row that still has room (best fit), whole.
   This is done once and gives a template: how many rows an epoch has, and which lengths share a row. What
   stays free is padding; `share_of_padding` tells its share.
3. *Shuffle.* An epoch deals the pieces of each length at random to the places of that length, shuffles the
   pieces within the rows, and the rows. So every epoch has the same number of rows, global row i is row i mod
   R of epoch i div R, each epoch holds every piece once, and any row can be had without the rows before it.

All of it is a pure function of (seed, epoch, lengths, spans, T).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from pretrain.data.documents import Documents
from zoo.noise import hash32

PADDING = -1


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of T tokens. Padding is at the end: token 0, modality and document -1, position 0."""

    tokens: np.ndarray
    """(T,) int32, ids of the tokens."""
    modality: np.ndarray
    """(T,) int8, in the order of the vocabulary's modalities."""
    position: np.ndarray
    """(T,) int32, index inside the piece."""
    document: np.ndarray
    """(T,) int32, number of the piece in the row, from 0."""
    item: np.ndarray
    """(T,) int32, number in the row of the item with bidirectional attention that a position belongs to, -1
    elsewhere."""
    content: dict[str, np.ndarray]
    """(n, …) what the row's positions carry of each modality that carries no ids, in their order."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Stretches of documents that are packed whole."""

    starts: np.ndarray
    """(n,) int64: first token, in the numbering of `Documents`."""
    lengths: np.ndarray
    """(n,) int64, each in [1, T]."""


class TokenStream:
    """Rows of packed documents, for ever: epoch after epoch, by number.

    Args:
        documents: what to pack.
        sequence_length: T.
        seed: of the order; None keeps the documents in their order, the same in each epoch.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int | None) -> None:
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self.pieces = cut(documents.starts, documents.spans, sequence_length)
        lengths = self.pieces.lengths
        order = np.arange(len(lengths)) if seed is None else shuffled(len(lengths), seed, 0)
        self._row_of_piece = np.empty(len(lengths), dtype=np.int64)
        self._row_of_piece[order] = fill(lengths[order], sequence_length)
        self.rows_per_epoch = int(self._row_of_piece.max()) + 1
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    @property
    def share_of_padding(self) -> float:
        """Padding over all places of an epoch."""
        return 1 - self.documents.total / (self.rows_per_epoch * self.sequence_length)

    def row(self, number: int) -> Row:
        """Global row `number` ≥ 0, counted over all epochs."""
        length = self.sequence_length
        tokens = np.zeros(length, np.int32)
        position = np.zeros(length, np.int32)
        document, item = (np.full(length, PADDING, np.int32) for _ in range(2))
        content = self._no_content()
        stop = 0
        for order, piece in enumerate(self.pieces_of_row(number).tolist()):
            size = int(self.pieces.lengths[piece])
            start, stop = stop, stop + size
            first = int(self.pieces.starts[piece])
            tokens[start:stop] = self.documents.read(first, size)
            position[start:stop] = np.arange(size)
            document[start:stop] = order
            for name, items in self.documents.items.items():
                if items.content:
                    content[name].append(items.carried(first, first + size))
                if items.bidirectional:
                    for begin, end in (items.inside(first, first + size) + (start - first)).tolist():
                        item[begin:end] = item.max() + 1
        modality = self.documents.vocabulary.modality_of(tokens)
        modality[stop:] = PADDING
        return Row(tokens, modality, position, document, item, _joined(content))

    def text_bytes(self, rows: range) -> float:
        """UTF-8 bytes of the texts in some rows, whatever they are tokenised by. Exact for whole documents."""
        pieces = np.concatenate([np.zeros(0, np.int64), *(self.pieces_of_row(row) for row in rows)])
        starts, lengths = self.pieces.starts[pieces].tolist(), self.pieces.lengths[pieces].tolist()
        return sum(self.documents.bytes_in(*stretch) for stretch in zip(starts, lengths, strict=True))

    def padding_row(self) -> Row:
        """A row of nothing but padding."""
        length = self.sequence_length
        zeros, padding = np.zeros(length, np.int32), np.full(length, PADDING, np.int32)
        return Row(zeros, padding.astype(np.int8), zeros, padding, padding, _joined(self._no_content()))

    def _no_content(self) -> dict[str, list[np.ndarray]]:
        """Nothing carried, of the type and shape of what may be."""
        return {name: [items.content[0][:0]] for name, items in self.documents.items.items() if items.content}

    def pieces_of_row(self, number: int) -> np.ndarray:
        """Numbers of the pieces in global row `number`, in their order."""
        if number < 0:
            raise ValueError(f"row {number}: rows are numbered from 0")
        epoch, row = divmod(number, self.rows_per_epoch)
        order, row_starts = self._plan(epoch if self.seed is not None else 0)
        return order[row_starts[row] : row_starts[row + 1]]

    def _make_plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Pieces sorted by their row in this epoch, (n,), and where each row starts among them, (rows +
        1,)."""
        count, rows = len(self.pieces.lengths), self._row_of_piece
        order = np.arange(count)
        if self.seed is not None:
            dealt, by_row, within = (
                shuffled(n, self.seed, 3 * epoch + k) for n, k in ((count, 1), (self.rows_per_epoch, 2), (count, 3))
            )
            # Places and pieces of equal length, paired: both sorted by length, the pieces at random within
            # it.
            places = np.argsort(self.pieces.lengths, kind="stable")
            pieces = dealt[np.argsort(self.pieces.lengths[dealt], kind="stable")]
            rows = np.empty_like(rows)
            rows[pieces] = by_row[self._row_of_piece[places]]
            order = within
        order = order[np.argsort(rows[order], kind="stable")]
        return order, np.searchsorted(rows[order], np.arange(self.rows_per_epoch + 1))


def _joined(content: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(runs) for name, runs in content.items()}


def cut(starts: np.ndarray, spans: np.ndarray, sequence_length: int) -> Pieces:
    """Documents as pieces of at most `sequence_length` tokens, in order.

    Args:
        starts: (d + 1,) first token of each document.
        spans: (s, 2) [start, stop) that no cut may enter, none longer than `sequence_length`.
    """
    lengths = np.diff(starts)
    long = np.flatnonzero(lengths > sequence_length)
    extra = []
    span_starts, span_stops = spans[:, 0], spans[:, 1]
    for document in long.tolist():
        start, stop = int(starts[document]), int(starts[document + 1])
        while stop - start > sequence_length:
            start += sequence_length
            span = int(np.searchsorted(span_starts, start, side="left")) - 1  # the last that begins before the cut
            if span >= 0 and span_stops[span] > start:
                start = int(span_starts[span])
            extra.append(start)
    edges = np.sort(np.concatenate([starts, np.array(extra, dtype=np.int64)]))
    return Pieces(edges[:-1], np.diff(edges))


def fill(lengths: np.ndarray, sequence_length: int) -> np.ndarray:
    """(n,) row of each piece by best fit: the fullest row that has room for it, else a new one.

    Args:
        lengths: (n,) of the pieces in the order in which they are placed, each in [1, sequence_length].
    """
    rows = np.empty(len(lengths), dtype=np.int64)
    with_room: list[list[int]] = [[] for _ in range(sequence_length + 1)]  # free places → rows
    occupied = 0  # bit r is set where with_room[r] holds a row: finding the fullest row that fits is bit arithmetic
    count = 0
    for piece, length in enumerate(lengths.tolist()):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = sequence_length, count
            count += 1
        rows[piece] = row
        room -= length
        if room:
            with_room[room].append(row)
            occupied |= 1 << room
    return rows


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of range(count) that depends on (count, seed, stream) alone, on any machine and NumPy."""
    state = hash32(np.array([seed & 0xFFFFFFFF], np.uint64))
    state = hash32(state ^ hash32(np.array([seed >> 32 & 0xFFFFFFFF], np.uint64)))
    state = hash32(state ^ np.uint32(stream))
    return np.argsort(hash32(hash32(np.arange(count)) ^ state), kind="stable")
