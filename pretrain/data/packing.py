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

All of it is a pure function of (seed, epoch, lengths, spans, T); `pretrain.data.plan` does it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from pretrain.data.documents import Documents
from pretrain.data.plan import plan_rows
from zoo.modalities import Vocabulary

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


class TokenStream:
    """Rows of packed documents, for ever: epoch after epoch, by number.

    Args:
        documents: what to pack.
        sequence_length: T.
        seed: of the order; None keeps the documents in their order, the same in each epoch.
        cache: folder for a plan that is too large to be made at each start; None keeps it in memory.
    Raises:
        DataError: see `plan_rows`.
    """

    def __init__(self, documents: Documents, sequence_length: int, seed: int | None, cache: Path | None = None) -> None:
        self.documents = documents
        self.sequence_length = sequence_length
        name = f"{documents.name}-{sequence_length}-{seed}"
        self.plan = plan_rows(lambda: documents.edges(sequence_length), sequence_length, seed, cache, name)
        self.rows_per_epoch = len(self.plan)
        self._deal = functools.lru_cache(maxsize=2)(self.plan.deal)

    @property
    def vocabulary(self) -> Vocabulary:
        """The ids that its tokens are from."""
        return self.documents.vocabulary

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
        for order, (first, size) in enumerate(self._stretches(number)):
            start, stop = stop, stop + size
            shard, offset = self.documents.place(first)
            tokens[start:stop] = shard.tokens[offset : offset + size]
            position[start:stop] = np.arange(size)
            document[start:stop] = order
            for name in content:
                content[name].append(shard.content[name][shard.items[name].positions(offset, offset + size)])
            for name in self.documents.bidirectional:
                table = shard.items[name].inside(offset, offset + size)
                for begin, end in (table[:2].T + (start - offset)).tolist():
                    item[begin:end] = item.max() + 1
        modality = self.vocabulary.modality_of(tokens)
        modality[stop:] = PADDING
        return Row(tokens, modality, position, document, item, _joined(content))

    def counts(self, number: int) -> np.ndarray:
        """(M,) int64: tokens of each modality in a row, known without reading it."""
        counts = dict.fromkeys(self.vocabulary.modalities, 0)
        for first, size in self._stretches(number):
            shard, offset = self.documents.place(first)
            where = {name: items.positions(offset, offset + size) for name, items in shard.items.items()}
            sizes = {name: positions.stop - positions.start for name, positions in where.items()}
            for name, positions in (sizes | {self.vocabulary.text: size - sum(sizes.values())}).items():
                counts[name] += positions
        return np.array(list(counts.values()), np.int64)

    def documents_of_row(self, number: int) -> np.ndarray:
        """(pieces,) int64: the number of the document that each piece in a row is from, in their order."""
        return np.array([self.documents.number(first) for first, _ in self._stretches(number)], np.int64)

    def text_bytes(self, number: int) -> float:
        """UTF-8 bytes of the texts in a row, whatever they are tokenised by. Exact for whole documents."""
        return sum(self.documents.bytes_in(*stretch) for stretch in self._stretches(number))

    def padding_row(self) -> Row:
        """A row of nothing but padding."""
        length = self.sequence_length
        zeros, padding = np.zeros(length, np.int32), np.full(length, PADDING, np.int32)
        return Row(zeros, padding.astype(np.int8), zeros, padding, padding, _joined(self._no_content()))

    def pieces_of_row(self, number: int) -> np.ndarray:
        """Numbers of the pieces in global row `number`, in their order."""
        if number < 0:
            raise ValueError(f"row {number}: rows are numbered from 0")
        epoch, row = divmod(number, self.rows_per_epoch)
        return self.plan.pieces_of_row(epoch, row, self._deal(epoch if self.plan.seed is not None else 0))

    def _stretches(self, number: int) -> list[tuple[int, int]]:
        """First token in the whole and number of tokens of each piece in a row."""
        numbers = self.pieces_of_row(number).astype(np.int64)
        pieces = self.plan.pieces
        return list(zip(pieces.starts(numbers).tolist(), pieces.lengths(numbers).tolist(), strict=True))

    def _no_content(self) -> dict[str, list[np.ndarray]]:
        """Nothing carried, of the type and shape of what may be."""
        return {name: [np.zeros((0, *shape), dtype)] for name, (dtype, shape) in self.documents.forms.items()}


def _joined(content: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate(runs) for name, runs in content.items()}
