"""The loss of each validation document at an evaluation, kept beside `metrics.jsonl`: what intervals over the choice of
documents are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from pretrain.data import Mixture
from pretrain.process_group import Ranks
from zoo.batch import Batch
from zoo.files import atomic_path
from zoo.trace import Terms

FOLDER = "documents"
"""Folder in a run folder, which holds a file `step-N.npz` for each evaluation."""


def path_of(run: Path, step: int) -> Path:
    """The file of the evaluation after `step` of a run."""
    return run / FOLDER / f"step-{step}.npz"


@dataclasses.dataclass(frozen=True)
class DocumentLosses:
    """Losses of n documents, by the P parts that the objective combines."""

    parts: tuple[str, ...]
    documents: np.ndarray
    """(n,) int64: numbers of the documents in the validation split, ascending."""
    sums: np.ndarray
    """(n, P) float64: terms of each part, summed over the document's positions in the rows that were evaluated."""
    counts: np.ndarray
    """(n, P) int64: how many terms."""

    def save(self, path: Path) -> None:
        """Write the file; atomic. Sums are kept in single precision."""
        path.parent.mkdir(exist_ok=True)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
                parts=np.array(self.parts),
                documents=self.documents,
                sums=self.sums.astype(np.float32),
                counts=self.counts.astype(np.int32),
            )

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as file:
            sums, counts = file["sums"].astype(np.float64), file["counts"].astype(np.int64)
            return cls(tuple(file["parts"].tolist()), file["documents"], sums, counts)


class ByDocument:
    """Adds up the terms of an evaluation's batches by document.

    Args:
        stream: validation rows.
        rows: how many of them are evaluated, over all ranks.
        first: number of the row that this rank begins with.
    """

    def __init__(self, stream: Mixture, rows: int, first: int) -> None:
        self.of_row = [stream.documents_of_row(number) for number in range(rows)]
        self.documents = np.unique(np.concatenate(self.of_row))
        self.next_row = first
        self.found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, batch: Batch, terms: Mapping[str, Terms]) -> None:
        """Take up the next batch's terms."""
        which = self._documents_of(batch)
        for part, of in terms.items():
            total, count = self.found.setdefault(part, self._zeros())
            total.index_add_(0, which, of.losses.double().cpu().reshape(-1))
            count.index_add_(0, which, of.counted.double().cpu().reshape(-1))

    def over(self, ranks: Ranks, parts: Sequence[str], device: torch.device | str) -> DocumentLosses:
        """The sums over all ranks; collective. Parts of which nothing was told are left out, the same on every rank."""
        told = tuple(part for part in parts if part in self.found)
        both = [torch.stack([self.found[part][which][:-1] for part in told], -1) for which in (0, 1)]
        sums, counts = ranks.sum(torch.stack(both).to(device)).cpu().numpy()
        return DocumentLosses(told, self.documents, sums, counts.astype(np.int64))

    def _documents_of(self, batch: Batch) -> torch.Tensor:
        """(B·T,) the place in `documents` of the document of each position; the one past the end for padding."""
        pieces, padding = batch.context.document.cpu(), len(self.documents)
        places = torch.full_like(pieces, padding)
        for row, number in enumerate(range(self.next_row, self.next_row + len(pieces))):
            if number < len(self.of_row):
                found = torch.from_numpy(np.searchsorted(self.documents, self.of_row[number]))
                found = torch.cat([found, found.new_tensor([padding])])  # what padding, −1, takes
                places[row] = found[pieces[row]]
        self.next_row += len(pieces)
        return places.reshape(-1)

    def _zeros(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A place for each document, and one for padding."""
        none = torch.zeros(len(self.documents) + 1, dtype=torch.float64)
        return none, none.clone()
