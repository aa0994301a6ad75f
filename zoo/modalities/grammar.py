"""Grammar: how an item of a modality stands in the stream, for those who read a stream and those who write one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from zoo.carries import Carries, Ids
from zoo.modalities.section import Modalities, vocabulary
from zoo.modality import ModalityConfig, Positions


class Choice(NamedTuple):
    """What one new token is chosen from: the ids [start, stop), all of one modality (its number in the model)."""

    start: int
    stop: int
    modality: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """n tokens of one row of the stream that follow each other."""

    tokens: np.ndarray
    """(n,) int64 ids."""
    modality: np.ndarray
    """(n,) int64, the number of each token's modality."""
    item: np.ndarray
    """(n,) int64, number within the piece of the item with bidirectional attention that a token belongs to, else −1."""
    content: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the positions of each modality carry that carries no ids, one row each, in their order."""

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, tokens: Sequence[int] | np.ndarray, modality: int) -> Piece:
        """Tokens of one modality, none of them in an item with bidirectional attention."""
        ids = np.asarray(tokens, np.int64)
        return cls(ids, np.full(len(ids), modality), np.full(len(ids), -1))

    @classmethod
    def join(cls, pieces: Sequence[Piece]) -> Piece:
        """One after the other, items numbered anew."""
        items, found = [], 0
        for piece in pieces:
            items.append(np.where(piece.item < 0, -1, piece.item + found))
            found += int(piece.item.max(initial=-1)) + 1
        content: dict[str, list[np.ndarray]] = {}
        for piece in pieces:
            for name, rows in piece.content.items():
                content.setdefault(name, []).append(rows)
        return cls(
            np.concatenate([piece.tokens for piece in pieces]),
            np.concatenate([piece.modality for piece in pieces]),
            np.concatenate(items),
            {name: np.concatenate(rows) for name, rows in content.items()},
        )


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A begin marker, positions, an end marker. Text has no markers and any number of positions."""

    name: str
    """Name of the modality."""
    config: ModalityConfig
    begin: int | None
    """Token of the marker."""
    end: int | None
    choice: Choice
    """What the token of a position is chosen from; where positions carry no ids, the one id that holds their places."""
    text: int
    """Number of the modality of text, which markers are of."""

    @property
    def carries(self) -> Carries:
        return self.config.carries

    @property
    def positions(self) -> Positions | None:
        return self.config.positions

    @property
    def holds_places(self) -> bool:
        """Positions carry no ids; one id holds their places."""
        return not isinstance(self.carries, Ids)

    def tokens(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The tokens of an item, int32, of the ids that its modality gave it; of the places, where it carries no ids.

        Args:
            ids: (n,) counted from 0; or anything of length n that is carried.
        """
        content = np.asarray(ids)
        own = content.astype(np.int32) if isinstance(self.carries, Ids) else np.zeros(len(content), np.int32)
        own = own + np.int32(self.choice.start)
        if self.begin is None or self.end is None:
            return own
        return np.concatenate([[self.begin], own, [self.end]]).astype(np.int32)

    def places(self, content: np.ndarray) -> Piece:
        """The positions of an item without its markers.

        Args:
            content: (n, …) what the positions carry; ids are counted from 0.
        """
        held = np.zeros(len(content), np.int64) if self.holds_places else np.asarray(content, np.int64)
        item = np.full(len(held), 0 if self.config.bidirectional else -1)
        carried = {self.name: np.asarray(content)} if self.holds_places else {}
        return Piece(held + self.choice.start, np.full(len(held), self.choice.modality), item, carried)

    def piece(self, content: np.ndarray) -> Piece:
        """An item with its markers, of what its modality's `encode` gave."""
        places = self.places(content)
        if self.begin is None or self.end is None:
            return places
        return Piece.join([Piece.of([self.begin], self.text), places, Piece.of([self.end], self.text)])


def grammars(modalities: Modalities) -> dict[str, Grammar]:
    """The grammar of each modality."""
    words, result = vocabulary(modalities), {}
    for number, (name, config) in enumerate(modalities.items()):
        markers = (None, None) if config.positions is None else (words.begin(name), words.end(name))
        result[name] = Grammar(
            name, config, *markers, Choice(*words.range(name), number), words.modalities.index(words.text)
        )
    return result
