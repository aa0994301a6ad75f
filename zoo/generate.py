"""Generation: parts in, parts out, for a trained run.

    run = zoo.load("runs/quickstart")
    [picture] = run.generate(["seven"], then="image", temperature=0.8)
    [word] = run.generate([Part("image", picture.item)], then="text")

A part is text, as a string, or an item of another modality. Without `then` the model decides itself what follows what,
and when the document ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import tqdm

from zoo import auxiliary
from zoo.choosing import Choosing
from zoo.config import UserError, suggestion
from zoo.modalities.grammar import Grammar, Piece
from zoo.modalities.vocabulary import Vocabulary
from zoo.modality import Modality
from zoo.model import Model
from zoo.objectives.denoising import Denoising
from zoo.sampling import Sampling
from zoo.slots import Objective
from zoo.writing import MARKERS, Rules, write

STOP_TAIL = 64
"""So many of the last ids of a text are looked at for a text that ends it."""


class Part(NamedTuple):
    """A part of a document."""

    modality: str
    """Name of its modality in the run."""
    item: Any
    """As the modality encodes it and its `decode` gives it: text is a string, a picture an array or a Pillow image."""


class Readable(Protocol):
    """What a document needs to know of a run: its modalities, and how they stand in the stream."""

    @property
    def folder(self) -> Path: ...
    @property
    def modalities(self) -> Any: ...
    @property
    def vocabulary(self) -> Vocabulary: ...
    @property
    def grammars(self) -> dict[str, Grammar]: ...


class Trained(Readable, Protocol):
    """What generation needs to know of a run."""

    @property
    def model(self) -> Model: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def length(self) -> int: ...


def generate(
    run: Trained,
    prompts: Sequence[Sequence[Part | str]],
    then: str | Sequence[str] | None,
    choosing: Choosing,
    sampling: Sampling,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    batch: int = 32,
    progress: bool = False,
) -> list[list[Part]]:
    """What follows each prompt; arguments as `Run.generate_all`."""
    check_causal(run)
    rules = _rules(run, then, stop)
    pieces = [document(run, parts) for parts in prompts]
    needed = sum(map(rules.least, rules.plan or ()))
    rooms = [_room(run, len(piece), needed, rules.plan, max_tokens) for piece in pieces]
    order = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))  # alike in a batch: little padding
    written: dict[int, list[Part]] = {}
    process = run.objective.process if isinstance(run.objective, Denoising) else None
    with tqdm.tqdm(
        total=sum(rooms), desc="generating", unit="token", disable=None if progress else True, leave=False
    ) as bar:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            rows = write(
                run.model,
                rules,
                [pieces[number] for number in chosen],
                chosen,
                [rooms[number] for number in chosen],
                choosing,
                sampling,
                process,
                bar.update,
            )
            written |= {number: _parts(run, row, stop) for number, row in zip(chosen, rows, strict=True)}
    return [written[number] for number in range(len(prompts))]


def document(run: Readable, parts: Iterable[Part | str]) -> Piece:
    """The beginning of a document that holds these parts.

    Raises:
        UserError: a part's modality is not the run's, or its item is no such thing.
    """
    begin = Piece.of([run.vocabulary.bos], run.grammars[run.vocabulary.text].text)
    return Piece.join([begin, *(piece_of(run, part, f"part {number + 1}") for number, part in enumerate(parts))])


def piece_of(run: Readable, part: Part | str, what: str) -> Piece:
    """A part as it stands in the stream, markers included.

    Args:
        what: begins messages.
    Raises:
        UserError: its modality is not the run's, or its item is no such thing.
    """
    name, item = (run.vocabulary.text, part) if isinstance(part, str) else part
    check_modality(run, name, what)
    modality: Modality = run.modalities[name]
    try:
        content = _text(run, item) if name == run.vocabulary.text else run.grammars[name].piece(modality.encode(item))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{what}: is no item of {name} ({error})") from None
    positions = modality.config.positions
    if positions is not None and not positions.least <= len(content) - MARKERS <= positions.most:
        raise UserError(
            f"{what}: takes {len(content) - MARKERS} positions of {name}, which has "
            f"{positions.least} to {positions.most}; give a shorter one"
        )
    return content


def read_part(run: Readable, part: str, path: str | Path) -> Part:
    """The item in a file, for the run's modality that reads such parts.

    Args:
        part: "image", "audio": the type of part of a document.
    Raises:
        UserError: the run has no such modality, or the file cannot be read as one.
    """
    name = modality_of_part(run, part)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return Part(name, run.modalities[name].config.read(content))
    except UserError:
        raise
    except Exception as error:  # kinds raise anything for bytes that are no such item
        raise UserError(f"{path}: is no {part} that {name} reads ({error})") from None


def modality_of_part(run: Readable, part: str) -> str:
    """Name of the run's modality that reads parts of a type.

    Raises:
        UserError: it has none.
    """
    found = [name for name, modality in run.modalities.items() if modality.config.part == part]
    if not found:
        raise UserError(f"{part}: {run.folder} has no modality that reads it; it has {', '.join(run.modalities)}")
    return found[0]


def check_modality(run: Readable, name: str, what: str) -> None:
    """Raise UserError where the run has no modality of that name; `what` begins the message."""
    if name not in run.modalities:
        raise UserError(
            f"{what}: {name!r} is no modality of {run.folder}; it has {', '.join(run.modalities)}"
            f"{suggestion(name, run.modalities)}"
        )


def check_causal(run: Trained) -> None:
    """Raise UserError where a block looks ahead and has no auxiliary router, so that nothing goes token by token."""
    auxiliary.check_causal(run.model, run.folder)


def _rules(run: Trained, then: str | Sequence[str] | None, stop: Sequence[str]) -> Rules:
    plan = None if then is None else [then] if isinstance(then, str) else list(then)
    for name in plan or ():
        check_modality(run, name, "then")
    text = run.vocabulary.text
    if plan is not None:  # a text after a text is one text
        plan = [name for i, name in enumerate(plan) if name != text or i == 0 or plan[i - 1] != text]
    drawn: Iterable[str] = ()
    if isinstance(run.objective, Denoising):
        drawn = (name for name, modality in run.modalities.items() if modality.config.bidirectional)
    return Rules(
        run.grammars, run.vocabulary, None if plan is None else tuple(plan), frozenset(drawn), _stopper(run, stop)
    )


def _stopper(run: Trained, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    if any(not each for each in stop):
        raise UserError("stop: an empty text stands everywhere; give the texts that end one")

    def stopped(ids: list[int]) -> bool:
        tail = run.modalities[run.vocabulary.text].decode(np.array(ids[-STOP_TAIL:])) if stop else ""
        return any(each in tail for each in stop)

    return stopped


def _room(run: Trained, prompt: int, needed: int, plan: Sequence[str] | None, max_tokens: int | None) -> int:
    """Most tokens to write after a prompt of so many tokens."""
    room = run.length - prompt
    if room < max(1, needed):
        what = f"{', '.join(plan)} take at least {needed} more" if plan else "there is no room to go on"
        raise UserError(
            f"prompt: takes {prompt} tokens, and {what}; {run.folder} was trained on {run.length} tokens and knows no "
            "longer document: shorten the prompt"
        )
    if max_tokens is None:
        return room
    if max_tokens < max(1, needed):
        raise UserError(
            f"max_tokens: {max_tokens}: {', '.join(plan or ['what follows'])} take at least {max(1, needed)}"
        )
    return min(room, max_tokens)


def _text(run: Readable, text: str) -> Piece:
    name = run.vocabulary.text
    if not isinstance(text, str):
        raise TypeError(f"a {type(text).__name__}")
    return run.grammars[name].piece(run.modalities[name].encode(text))


def _parts(run: Trained, row: Sequence[tuple[str, np.ndarray]], stop: Sequence[str]) -> list[Part]:
    parts = []
    for name, content in row:
        item = run.modalities[name].decode(content)
        if name == run.vocabulary.text:
            found = [item.index(each) for each in stop if each in item]
            item = item[: min(found)] if found else item
        parts.append(Part(name, item))
    return parts
