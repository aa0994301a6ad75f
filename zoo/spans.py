"""Spans: where the documents and items of a batch stand, as numbers on the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from torch import Tensor

Span = tuple[int, int, int]
"""(row, start, length) of a document or an item; several are in row and time order."""


@dataclasses.dataclass(frozen=True)
class Spans:
    """Where the documents and the items of a batch stand, known on the host."""

    documents: tuple[Span, ...]
    items: tuple[Span, ...]

    @classmethod
    def of(cls, document: Tensor, item: Tensor | None) -> Spans:
        """Spans of documents and items, both (B, T) with −1 where there is none; copied to the host where they are not.

        Raises:
            ValueError: the tokens of one id do not stand together, or an item is not inside one document.
        """
        ids = document.cpu().numpy()
        documents = _runs(ids, "document")
        return cls(documents, () if item is None else _items(item.cpu().numpy(), ids))

    @property
    def single_document(self) -> bool:
        """Every row holds at most one document, which begins in its first column."""
        rows = {row for row, _, _ in self.documents}
        return len(rows) == len(self.documents) and all(start == 0 for _, start, _ in self.documents)

    def boundaries(self, columns: int) -> list[int]:
        """Three places for each span, documents first: where its row begins, where it begins, and where it ends.

        A place is a flat index into B·T, T being `columns`; the end of the last row is B·T.
        """
        return [
            row * columns + column
            for row, start, length in self.documents + self.items
            for column in (0, start, start + length)
        ]

    def narrowed(self, before: Sequence[int]) -> Spans:
        """The spans among the tokens that are kept; `before` says how many are kept before each of `boundaries`."""
        places = zip(self.documents + self.items, before[0::3], before[1::3], before[2::3], strict=True)
        left = [(row, start - first, end - start) for (row, _, _), first, start, end in places]
        documents, items = left[: len(self.documents)], left[len(self.documents) :]
        return Spans(tuple(s for s in documents if s[2]), tuple(s for s in items if s[2]))


def _runs(ids: np.ndarray, what: str) -> tuple[Span, ...]:
    """The span of every id ≥ 0; `what` the ids number is for the error."""
    if ids.size == 0:
        return ()
    begins = np.ones_like(ids, dtype=bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    rows, starts = np.nonzero(begins)
    ends = np.append(rows * ids.shape[1] + starts, ids.size)
    lengths = np.diff(ends)
    real = ids[rows, starts] >= 0
    begun = np.stack((rows, ids[rows, starts]))[:, real]
    if np.unique(begun, axis=1).shape[1] < begun.shape[1]:
        raise ValueError(f"{what}: an id stands in two places of a row; the tokens of one {what} stand together")
    return tuple(zip(rows[real].tolist(), starts[real].tolist(), lengths[real].tolist(), strict=True))


def _items(item: np.ndarray, document: np.ndarray) -> tuple[Span, ...]:
    """The span of every item, each inside one document."""
    spans = _runs(item, "item")
    for row, start, length in spans:
        end = start + length - 1
        if document[row, start] < 0 or document[row, start] != document[row, end]:
            raise ValueError(
                f"item: {item[row, start]} of row {row}, columns {start} to {end}, is not inside one document; an item "
                "is a part of its document, and padding belongs to none"
            )
    return spans
