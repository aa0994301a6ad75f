"""Grids of digits and what can be asked of them; `make_digit_grids` draws and writes them.

A grid is an array of digits 0..9, `BLANK` where there is none, (R, C), or (F, R, C) for F frames. Its axes have names.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tools.examples.make_digits import NAMES

PLURALS = tuple(f"{name}es" if name in ("zero", "six") else f"{name}s" for name in NAMES)
BLANK, NOTHING = -1, "nothing"
CLASSES = 6
"""Digits that a grid chooses from; fewer than ten, so that counts above one are common."""
ABSENT = 0.2
"""Share of `count` questions about a digit that is not there."""

Turn = dict[str, str]
"""`question`, `answer`, `kind`."""


def draw_cells(rng: np.random.Generator, axes: tuple[tuple[str, int], ...], least: int | None) -> np.ndarray:
    """Digits 0..9, or `BLANK`, of a grid whose sides are the lengths of `axes`.

    Args:
        least: fill `least` cells (or all that may be) to 80 % of them, log-uniform, which teaches what a digit's place
            is before grids are crowded; None: a quarter to 80 %, uniform.
    """
    shape = [length for _, length in axes]
    size = int(np.prod(shape))
    most = max(1, int(0.8 * size))
    if least is None:
        filled = rng.integers(max(1, size // 4), most + 1)
    else:
        filled = int(np.exp(rng.uniform(np.log(min(least, most)), np.log(most + 1))))
    classes = rng.choice(len(NAMES), CLASSES, replace=False)
    return np.where(rng.permutation(size) < filled, rng.choice(classes, size), BLANK).reshape(shape)


def ask_cell(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Questions about every cell."""
    for index in rng.permutation(cells.size):
        at = np.unravel_index(index, cells.shape)
        address = ", ".join(f"{name} {place + 1}" for name, place in zip(names, at, strict=True))
        yield _turn("cell", f"What is at {address}?", NOTHING if cells[at] == BLANK else NAMES[cells[at]])


def ask_count(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Questions about every digit that is there, and one time in five about one that is not."""
    counts = (cells[..., None] == np.arange(len(NAMES))).reshape(-1, len(NAMES)).sum(0)
    there, absent = np.flatnonzero(counts), np.flatnonzero(counts == 0)
    extra = int(len(there) * ABSENT / (1 - ABSENT) + rng.random())
    for digit in rng.permutation([*there, *rng.permutation(absent)[:extra]]):
        yield _turn("count", f"How many {PLURALS[digit]}?", str(counts[digit]))


def ask_which(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Along each axis, of every digit that is there, once or more, in exactly one place of it."""
    asked = []
    for axis, name in enumerate(names):
        held = np.stack([np.isin(np.arange(len(NAMES)), part) for part in np.moveaxis(cells, axis, 0)])
        for digit in np.flatnonzero(held.sum(0) == 1):
            article = "an" if NAMES[digit] == "eight" else "a"
            place = int(held[:, digit].argmax()) + 1
            asked.append(_turn("which", f"Which {name} has {article} {NAMES[digit]}?", f"{name} {place}"))
    yield from (asked[i] for i in rng.permutation(len(asked)))


def ask_beside(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Along each axis, of every digit that is there exactly once, where its place of the axis holds one other digit:
    two steps, from the digit to its place, from there to the other. A row or column is that of all frames."""
    asked = []
    for axis, name in enumerate(names):
        for part in np.moveaxis(cells, axis, 0):
            found = part[part != BLANK]
            if len(found) != 2:
                continue
            for digit, other in (found, found[::-1]):
                if (cells == digit).sum() == 1:
                    asked.append(_turn("beside", f"What shares a {name} with the {NAMES[digit]}?", NAMES[other]))
    yield from (asked[i] for i in rng.permutation(len(asked)))


ASK = {"cell": ask_cell, "count": ask_count, "which": ask_which, "beside": ask_beside}
"""Each gives all questions of its kind in random order, none twice."""


def _turn(kind: str, question: str, answer: str) -> Turn:
    return {"question": question, "answer": answer, "kind": kind}
