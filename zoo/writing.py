"""Writing on: each row of the stream token by token, under the grammar of its modalities.

Between items come text, begin markers and the end of the document; after a begin marker exactly the positions of its
item, then its end marker. Positions that carry ids are chosen, channels are chosen one by one of a position, vectors
are what their head predicts, and an item that a model learned to denoise is drawn from noise whole (`zoo.sampling`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo import noise
from zoo.carries import Channels, Vectors
from zoo.choosing import Choosing, choose, noise_keys, penalise
from zoo.modalities.grammar import Grammar, Piece
from zoo.modalities.vocabulary import Vocabulary
from zoo.model import Model
from zoo.objectives.processes import Process
from zoo.prefix import Prefix, Said
from zoo.sampling import Sampling, draw_item

MARKERS = 2
"""Tokens that stand round an item."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """What may be written."""

    grammars: Mapping[str, Grammar]
    vocabulary: Vocabulary
    plan: tuple[str, ...] | None
    """The parts that follow, by modality; None leaves them to the model, until it ends the document."""
    drawn: frozenset[str] = frozenset()
    """Modalities whose items are drawn from noise."""
    stop: Callable[[list[int]], bool] = lambda ids: False
    """Whether a text of these ids, counted from 0, is to end here."""

    @property
    def text(self) -> Grammar:
        return self.grammars[self.vocabulary.text]

    def least(self, name: str) -> int:
        """Fewest tokens of a part."""
        positions = self.grammars[name].positions
        return 1 if positions is None else positions.least + MARKERS


class Row:
    """One row being written.

    Args:
        prompt: what stands there.
        sample: its number, which its noise is drawn by.
        room: most tokens to write.
    """

    def __init__(self, rules: Rules, prompt: Piece, sample: int, room: int) -> None:
        self.rules, self.sample, self.room, self.position = rules, sample, room, len(prompt)
        self.plan = None if rules.plan is None else list(rules.plan)
        self.parts: list[tuple[str, np.ndarray]] = []
        self.words: list[int] = []
        """Ids of the text being written."""
        self.inside: Grammar | None = None
        """The grammar of the item being written; None between items."""
        self.most = 0
        self.content: list[np.ndarray] = []
        self.done = self.plan == [] or room < 1
        start, stop, _ = rules.text.choice
        self.seen = {int(token) for token in prompt.tokens if start <= token < stop}
        """Tokens of text that stand in the document."""

    @property
    def wants_drawing(self) -> bool:
        """The item that has been begun is drawn whole."""
        return self.inside is not None and self.inside.name in self.rules.drawn and not self.content

    def choices(self) -> list[tuple[int, int]]:
        """Ranges [start, stop) of the tokens that may come next."""
        rules, item = self.rules, self.inside
        if item is not None:
            return inside_choices(item, self.content, self.most)
        if self.plan and self.plan[0] != rules.text.name:
            return [_marker(rules.grammars[self.plan[0]])]
        items = [each for each in rules.grammars.values() if each.begin is not None]
        if self.plan is None:
            items = [each for each in items if rules.least(each.name) <= self.room]
        elif not self.words:
            return [rules.text.choice[:2]]
        eos = rules.vocabulary.eos
        return [rules.text.choice[:2], (eos, eos + 1), *map(_marker, items)]

    def take(self, token: int, predicted: np.ndarray | None) -> Piece | None:
        """Write a token; returns what the model is to see of it, None where the row is done.

        Args:
            predicted: where the token holds the place of something, that: (…).
        """
        if self.inside is not None:
            return self._position(self.inside, token, predicted)
        start, stop, number = self.rules.text.choice
        if start <= token < stop:
            return self._word(token, number)
        self._end_text()
        if self.plan is None:
            begun = next((each for each in self.rules.grammars.values() if each.begin == token), None)
            if begun is None:
                self.done = True
                return None
            return self._begin(begun)
        if self.plan[0] != self.rules.text.name:
            return self._begin(self.rules.grammars[self.plan[0]])
        return self._next()

    def take_item(self, content: np.ndarray) -> Piece:
        """Write a whole item that was drawn; content (n, …)."""
        assert self.inside is not None
        self.content = list(content)
        self.room, self.position = self.room - len(content), self.position + len(content)
        return self.inside.places(content)

    def _word(self, token: int, number: int) -> Piece | None:
        self._count()
        self.words.append(token - self.rules.text.choice.start)
        self.seen.add(token)
        if self.room <= self._reserved() or self.rules.stop(self.words):
            self._end_text()
            if self.plan is None:
                self.done = True
                return None
            following = self._next()
            return None if following is None else Piece.join([Piece.of([token], number), following])
        return Piece.of([token], number)

    def _position(self, item: Grammar, token: int, predicted: np.ndarray | None) -> Piece | None:
        self._count()
        if token != item.end:
            one = np.array([token - item.choice.start]) if predicted is None else predicted[None]
            self.content.append(one[0])
            return item.places(one)
        self.parts.append((item.name, np.stack(self.content)))
        self.inside, end = None, Piece.of([token], item.text)
        if self.plan is None:
            self.done = self.room < 1
            return None if self.done else end
        self.plan.pop(0)
        self.done = not self.plan
        return None if self.done else end

    def _next(self) -> Piece | None:
        """Text of the plan has ended: go on with what it says next."""
        assert self.plan is not None
        self.plan.pop(0)
        if not self.plan:
            self.done = True
            return None
        return self._begin(self.rules.grammars[self.plan[0]])

    def _begin(self, item: Grammar) -> Piece:
        assert item.positions is not None and item.begin is not None
        self._count()
        self.inside, self.content = item, []
        self.most = min(item.positions.most, self.room - 1 - self._reserved())
        return Piece.of([item.begin], item.text)

    def _end_text(self) -> None:
        if self.words:
            self.parts.append((self.rules.text.name, np.array(self.words)))
        self.words = []

    def _reserved(self) -> int:
        """Tokens that the rest of the plan needs at least."""
        return sum(map(self.rules.least, (self.plan or [])[1:]))

    def _count(self) -> None:
        self.room, self.position = self.room - 1, self.position + 1


def inside_choices(item: Grammar, content: Sequence[Any], most: int) -> list[tuple[int, int]]:
    """Ranges [start, stop) of the tokens that may come next inside an item.

    Args:
        content: what its positions carry so far; ids are counted from 0.
        most: positions after which it ends where it may.
    """
    assert item.end is not None
    following, start = item.config.following(content), item.choice.start
    end = [(item.end, item.end + 1)] if following.end else []
    if following.ids is None or (following.end and len(content) >= most):
        return end
    return [(start + following.ids[0], start + following.ids[1]), *end]


def _marker(item: Grammar) -> tuple[int, int]:
    assert item.begin is not None
    return item.begin, item.begin + 1


@torch.no_grad()
def write(
    model: Model,
    rules: Rules,
    prompts: Sequence[Piece],
    samples: Sequence[int],
    rooms: Sequence[int],
    choosing: Choosing,
    sampling: Sampling,
    process: Process | None = None,
    tick: Callable[[int], Any] = lambda tokens: None,
) -> list[list[tuple[str, np.ndarray]]]:
    """Go on with each prompt; what a row becomes does not depend on the others.

    Args:
        samples: number of each row, which its noise is drawn by.
        rooms: most tokens to write in each row.
        sampling: how items are drawn from noise; its guidance is `choosing.guidance`.
        process: of the objective that the model learned to denoise by, where `rules.drawn` names any.
        tick: is told how many tokens have been written.
    Returns:
        for each row its parts, (modality, what its positions carry).
    """
    rows = [Row(rules, *each) for each in zip(prompts, samples, rooms, strict=True)]
    writer = _Writer(model, rules, [row for row in rows if not row.done], choosing, sampling, process)
    if writer.rows:
        writer.start([prompt for prompt, row in zip(prompts, rows, strict=True) if not row.done])
    while writer.rows:
        tick(writer.step())
    return [row.parts for row in rows]


class _Writer:
    """The rows that are not done yet, and what the model has seen of them."""

    def __init__(
        self,
        model: Model,
        rules: Rules,
        rows: list[Row],
        choosing: Choosing,
        sampling: Sampling,
        process: Process | None,
    ) -> None:
        self.model, self.rules, self.rows = model, rules, rows
        self.choosing, self.process = choosing, process
        self.sampling = sampling.model_copy(update={"guidance": choosing.guidance})
        longest = [each.positions.most for each in rules.grammars.values() if each.positions is not None]
        # an item that may not end yet is written to its end
        length = max((row.position + row.room for row in rows), default=0) + MARKERS + max(longest, default=0)
        self.prefix = Prefix(model, len(rows), length)
        # each item begins a document of its own there, whose begin marker may need a document's before it
        self.plain = Prefix(model, len(rows), 2 * length) if choosing.guidance != 1 else None
        self.device = model.norm.weight.device

    def start(self, prompts: Sequence[Piece]) -> None:
        self.said = self.prefix.feed(prompts)
        self.unled = self.said
        """What the model says of the items without the rest of their documents."""

    def step(self) -> int:
        """Write one token in every row, or the items that wait to be drawn; returns how many tokens that were."""
        before = sum(row.position for row in self.rows)
        waiting = [number for number, row in enumerate(self.rows) if row.wants_drawing]
        pieces = self._drawn(waiting) if waiting else self._chosen()
        written = sum(row.position for row in self.rows) - before
        if any(piece is not None for piece in pieces):
            self.said = _newer(self.said, self.prefix.feed(pieces), pieces)
            self._feed_plain(pieces)
        left = [number for number, row in enumerate(self.rows) if not row.done]
        if 2 * len(left) <= len(self.rows):
            self._keep(left)
        return written

    def _chosen(self) -> list[Piece | None]:
        said = self._guided()
        keys = noise_keys(self.choosing.seed, [row.sample for row in self.rows], [row.position for row in self.rows])
        tokens = choose(self._masked(said.logits), self.choosing, keys, "generate.token").tolist()
        predicted = {name: self._values(name, said.predicted[name], keys) for name in self.model.heads}
        pieces: list[Piece | None] = []
        for number, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            item = row.inside
            held = item is not None and item.holds_places and token == item.choice.start
            value = predicted[item.name][number] if item is not None and held else None
            pieces.append(None if row.done else row.take(token, value))
        return pieces

    def _masked(self, logits: Tensor) -> Tensor:
        """Logits (B, V) with −inf where a token may not come next."""
        allowed = torch.zeros(logits.shape, dtype=torch.bool)
        penalty = self.choosing.repetition_penalty
        logits = logits.clone() if penalty != 1 else logits
        for number, row in enumerate(self.rows):
            for start, stop in row.choices() if not row.done else [(0, 1)]:
                allowed[number, start:stop] = True
            if penalty != 1 and row.inside is None and row.seen:
                seen = torch.tensor(sorted(row.seen), device=logits.device)
                logits[number] = penalise(logits[number], seen, penalty)
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def _values(self, name: str, predicted: Tensor, keys: Tensor) -> np.ndarray:
        """What positions carry by the prediction of their head: (B, …)."""
        match self.model.carries[name]:
            case Channels():
                return choose(predicted, self.choosing, keys, f"generate.{name}").cpu().numpy()
            case Vectors():
                return predicted.float().cpu().numpy()
        raise AssertionError(f"{name} has a head of its own and carries ids")

    def _guided(self) -> Said:
        """What is said, inside items moved away from what is said without the rest of the document."""
        if self.plain is None:
            return self.said
        inside = torch.tensor([row.inside is not None for row in self.rows], device=self.device)

        def move(led: Tensor, unled: Tensor) -> Tensor:
            moved = unled + self.choosing.guidance * (led - unled)
            return torch.where(inside.view(-1, *[1] * (led.dim() - 1)), moved, led)

        predicted = {name: move(each, self.unled.predicted[name]) for name, each in self.said.predicted.items()}
        return Said(move(self.said.logits, self.unled.logits), predicted)

    def _drawn(self, waiting: Sequence[int]) -> list[Piece | None]:
        """Draw the items that are waiting, one modality of them."""
        item = self.rows[waiting[0]].inside
        assert item is not None and item.positions is not None and self.process is not None
        waiting = [number for number in waiting if self.rows[number].inside is item]
        carries, count = self.model.carries[item.name], item.positions.most
        assert isinstance(carries, Vectors)
        rows = [self.rows[number] for number in waiting]
        keys = noise_keys(
            self.choosing.seed,
            [row.sample for row in rows for _ in range(count)],
            [row.position + place for row in rows for place in range(count)],
        ).to(self.device)

        def normal(step: int) -> Tensor:
            drawn = noise.normal(keys, noise.salt("generate.noise", step), carries.width)
            return drawn.view(len(rows), count, carries.width).to(self.model.norm.weight.dtype)

        content = draw_item(
            self.model,
            item,
            self.prefix.branch(waiting),
            self.process,
            self.sampling,
            normal(0),
            None if self.plain is None else self.plain.branch(waiting),
            lambda step: normal(step + 1),
        )
        pieces: list[Piece | None] = [None] * len(self.rows)
        for number, values in zip(waiting, content.float().cpu().numpy(), strict=True):
            pieces[number] = self.rows[number].take_item(values)
        return pieces

    def _feed_plain(self, pieces: Sequence[Piece | None]) -> None:
        if self.plain is None:
            return
        alone: list[Piece | None] = []
        for number, (row, piece) in enumerate(zip(self.rows, pieces, strict=True)):
            if row.inside is None or piece is None or row.done:
                alone.append(None)
            elif row.content:
                alone.append(piece)
            else:
                assert row.inside.begin is not None
                self.plain.begin(number)
                whole = row.inside.name in self.rules.drawn
                first = [] if whole else [self.rules.vocabulary.bos]  # as it was trained: see `drop_context`
                alone.append(Piece.of([*first, row.inside.begin], row.inside.text))
        if any(piece is not None for piece in alone):
            self.unled = _newer(self.unled, self.plain.feed(alone), alone)

    def _keep(self, left: Sequence[int]) -> None:
        self.rows = [self.rows[number] for number in left]
        index = torch.tensor(left, dtype=torch.int64, device=self.device)
        self.said, self.unled = (
            Said(said.logits[index], {name: each[index] for name, each in said.predicted.items()})
            for said in (self.said, self.unled)
        )
        for prefix in (self.prefix, self.plain):
            if prefix is not None and left:
                prefix.keep(left)


def _newer(old: Said, new: Said, pieces: Sequence[Piece | None]) -> Said:
    """What was said last of each row: the new where it went on."""
    fed = torch.tensor([piece is not None for piece in pieces], device=new.logits.device)

    def pick(before: Tensor, now: Tensor) -> Tensor:
        return torch.where(fed.view(-1, *[1] * (now.dim() - 1)), now, before)

    predicted = {name: pick(old.predicted[name], each) for name, each in new.predicted.items()}
    return Said(pick(old.logits, new.logits), predicted)
