"""Grids of digits and what can be asked of them; `make_digit_grids` draws and writes them.

A grid is an array of digits 0..9, `BLANK` where there is none, (R, C), or (F, R, C) for F frames. Its axes have names.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tools.make_digits import NAMES

PLURALS = tuple(f"{name}es" if name in ("zero", "six") else f"{name}s" for name in NAMES)
BLANK, NOTHING = -1, "nothing"
CLASSES = 6
"""Digits that a grid chooses from; fewer than ten, so that counts above one are common."""
ABSENT = 0.2
"""Share of `count` questions about a digit that is not there."""

Turn = dict[str, str]
"""`question`, `answer`, `kind`."""


def draw_cells(rng: np.random.Generator, axes: tuple[tuple[str, int], ...]) -> np.ndarray:
    """Digits 0..9, or `BLANK`, of a grid whose sides are the lengths of `axes`: a quarter to 80 % of the cells are filled."""
    shape = [length for _, length in axes]
    size = int(np.prod(shape))
    filled = rng.permutation(size) < rng.integers(size // 4, int(0.8 * size) + 1)
    classes = rng.choice(len(NAMES), CLASSES, replace=False)
    return np.where(filled, rng.choice(classes, size), BLANK).reshape(shape)


def draw_pattern(rng: np.random.Generator, axes: tuple[tuple[str, int], ...]) -> tuple[np.ndarray, int | None]:
    """A grid that is constant but for one axis, and this axis; None where all cells hold the same digit."""
    shape = [length for _, length in axes]
    axis = int(rng.integers(-1, 2 * len(axes))) // 2
    if axis < 0:
        return np.full(shape, rng.integers(len(NAMES))), None
    line = np.where(rng.random(shape[axis]) < 0.25, BLANK, rng.integers(len(NAMES), size=shape[axis]))
    return np.broadcast_to(line.reshape([-1 if a == axis else 1 for a in range(len(shape))]), shape), axis


def ask_cell(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Of every cell; the parts of the address come in any order."""
    for index in rng.permutation(cells.size):
        at = np.unravel_index(index, cells.shape)
        address = [f"{names[axis]} {at[axis] + 1}" for axis in rng.permutation(len(at))]
        yield _turn("cell", f"What is at {', '.join(address)}?", _name(cells[at]))


def ask_count(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Of every digit, one time in five of one that is not there; among frames, of a digit in one of them."""
    parts = cells.reshape(-1, *cells.shape[-2:])  # frames, or the grid itself
    counts = (parts[..., None] == np.arange(len(NAMES))).sum((1, 2))  # (frames, digits)
    there = counts > 0
    weight = np.where(there, (1 - ABSENT) / max(there.sum(), 1), ABSENT / max((~there).sum(), 1))
    for flat in (rng.exponential(size=counts.shape) / weight).ravel().argsort():  # drawn by weight, without repeats
        part, digit = np.unravel_index(flat, counts.shape)
        where = f" at {names[0]} {part + 1}" if cells.ndim == 3 else ""
        yield _turn("count", f"How many {PLURALS[digit]}{where}?", str(counts[part, digit]))


def ask_which(rng: np.random.Generator, cells: np.ndarray, names: list[str]) -> Iterator[Turn]:
    """Along the first axis, of every digit that is there once or more in exactly one place of it."""
    held = np.stack([np.isin(np.arange(len(NAMES)), part) for part in cells])  # (length, digits)
    for digit in rng.permutation(np.flatnonzero(held.sum(0) == 1)):
        article = "an" if NAMES[digit] == "eight" else "a"
        answer = f"{names[0]} {int(held[:, digit].argmax()) + 1}"
        yield _turn("which", f"Which {names[0]} has {article} {NAMES[digit]}?", answer)


ASK = {"cell": ask_cell, "count": ask_count, "which": ask_which}
"""Each gives all questions of its kind in random order, none twice."""


def ask_lines(cells: np.ndarray, axis: int, names: list[str]) -> list[Turn]:
    """What each row (column, frame) of a patterned grid holds."""
    line = np.moveaxis(cells, axis, 0).reshape(cells.shape[axis], -1)[:, 0]
    return [_turn("line", f"What is at {names[axis]} {i + 1}?", _name(digit)) for i, digit in enumerate(line)]


def _name(digit: int) -> str:
    return NOTHING if digit == BLANK else NAMES[digit]


def _turn(kind: str, question: str, answer: str) -> Turn:
    return {"question": question, "answer": answer, "kind": kind}
