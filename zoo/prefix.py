"""What the model has seen of some rows so far: it goes on with pieces of the stream, each row with its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from zoo.batch import Batch
from zoo.carries import Vectors
from zoo.context import CAUSAL, TokenContext
from zoo.modalities.grammar import Grammar, Piece
from zoo.model import Model


@dataclasses.dataclass(frozen=True)
class Said:
    """What the model says after the last token of each row; zeros where a row did not go on."""

    logits: Tensor
    """(B, V) of every id."""
    predicted: Mapping[str, Tensor]
    """What the head of each modality that has one of its own predicts of the position that comes next: (B, …)."""


def together(pieces: Sequence[Piece | None], model: Model, lengths: Sequence[int], documents: Sequence[int]) -> Batch:
    """A batch of a piece a row, in causal routing, padded on the right; None is a row of padding.

    Args:
        lengths: tokens that stand before each piece in its document.
        documents: number of the document that each row goes on with.
    """
    device = model.norm.weight.device
    shape = len(pieces), max((len(piece) for piece in pieces if piece is not None), default=0)
    tokens, position = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    modality, document, item = (np.full(shape, -1) for _ in range(3))
    for row, piece in enumerate(pieces):
        if piece is not None:
            n = len(piece)
            tokens[row, :n], modality[row, :n], item[row, :n] = piece.tokens, piece.modality, piece.item
            position[row, :n], document[row, :n] = lengths[row] + np.arange(n), documents[row]
    context = TokenContext.from_modality(
        torch.from_numpy(modality),
        torch.from_numpy(document),
        torch.from_numpy(position),
        modalities=model.modalities,
        routing=CAUSAL,
        item=torch.from_numpy(item) if (item >= 0).any() else None,
    )
    content = {}
    for name, carries in model.carries.items():
        rows = [piece.content[name] for piece in pieces if piece is not None and name in piece.content]
        if rows:
            joined = torch.from_numpy(np.concatenate(rows))
            content[name] = joined.to(model.norm.weight.dtype if isinstance(carries, Vectors) else torch.int64)
    return Batch(torch.from_numpy(tokens), context, content).to(device)


class Prefix:
    """B rows of the stream, each one document, and the model's states that have seen them.

    Args:
        rows: B.
        length: most tokens of a row.
    """

    def __init__(self, model: Model, rows: int, length: int) -> None:
        self.model, self.states = model, model.init_state(rows, length)
        self.lengths, self.documents = [0] * rows, [0] * rows

    def begin(self, row: int) -> None:
        """Let a row begin another document; what it has seen so far is out of sight."""
        self.lengths[row], self.documents[row] = 0, self.documents[row] + 1

    @torch.no_grad()
    def feed(self, pieces: Sequence[Piece | None]) -> Said:
        """Go on with a piece a row; a row whose piece is None stays where it is."""
        batch = together(pieces, self.model, self.lengths, self.documents)
        width, sizes = batch.tokens.shape[1], [0 if piece is None else len(piece) for piece in pieces]
        self.lengths = [before + n for before, n in zip(self.lengths, sizes, strict=True)]
        last = torch.tensor([row * width + max(n, 1) - 1 for row, n in enumerate(sizes)], device=batch.tokens.device)
        logits, predicted = self.model(
            batch.tokens,
            batch.context,
            self.states,
            batch.content,
            read=dict.fromkeys(self.model.heads, last),
            logits_at=last,
        )
        return Said(logits, predicted)

    @torch.no_grad()
    def denoise(self, model: Model, grammar: Grammar, mixture: Tensor, time: Tensor) -> Tensor:
        """What the head says of an item that would come next in every row, of which nothing is remembered.

        Args:
            mixture: (B, n, width).
            time: scalar, from 0 (data) to 1 (noise).
        Returns:
            (B, n, width).
        """
        rows, count, _ = mixture.shape
        places = grammar.places(np.zeros((count, 1), np.float32))
        blank = dataclasses.replace(places, content={})
        batch = together([blank] * rows, model, self.lengths, self.documents)
        every = torch.arange(rows * count, device=mixture.device)
        _, predicted = model(
            batch.tokens,
            batch.context,
            [None if state is None else state.clone() for state in self.states],
            {grammar.name: mixture.flatten(0, 1)},
            time={grammar.name: time.expand(rows * count)},
            read={name: every if name == grammar.name else every[:0] for name in model.heads},
            logits_at=every[:0],
        )
        return predicted[grammar.name].unflatten(0, (rows, count))

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows alone."""
        index = torch.tensor(rows, device=self.model.norm.weight.device)
        for state in self.states:
            if state is not None:
                state.reorder(index)
        self.lengths, self.documents = ([values[row] for row in rows] for values in (self.lengths, self.documents))

    def branch(self, rows: Sequence[int]) -> Prefix:
        """Some of the rows, to go on apart from this one."""
        other = object.__new__(Prefix)
        other.model, other.lengths, other.documents = self.model, list(self.lengths), list(self.documents)
        other.states = [None if state is None else state.clone() for state in self.states]
        other.keep(rows)
        return other
