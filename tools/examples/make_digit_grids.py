"""Write grids of scikit-learn's handwritten digits with questions and answers: a real visual question answering set
without a download.

    python -m tools.examples.make_digit_grids FOLDER [--train 8000] [--frames 4] [--rows 2 --columns 2] ...

FOLDER gets `train.jsonl`, `validation.jsonl`, `test.jsonl` and the pictures they name (paths relative to FOLDER). A
training line is one picture with several turns, `{"image": …, "turns": [{"question", "answer", "kind"}, …], "cells"}`;
a held-out line is one question, `{"image", "question", "answer", "kind", "cells"}`. `cells` are the digits of the grid,
-1 where blank. With `--frames F` a line has `images`, the F frames in order, in place of `image`.

Kinds: `cell` "What is at row 2, column 3?", `count` "How many sevens?", `which` "Which row has a nine?" (or column, or
frame; asked where exactly one has). With frames a cell's address begins with its frame, and counts are of all of them.
With `--beside N` also `beside` "What shares a row with the nine?" (the one other digit there), N times as often as
cells: it takes two steps, from the digit to its row and from the row to the other digit. `--least 3` makes such rows
common. Training grids hold few digits more often than many: what "which row" asks is hardly learnt from crowded ones
alone.

No digit of a training grid is in a held-out one. Test grids take the 297 digits held out by
`tools.examples.make_digits`; its 1,500 training digits are divided again, stratified by class, in 1,200 for training
and 300 for validation. The split is by digit, not by writer: the collection does not say who wrote what. Only training
digits are shifted. The same arguments give the same bytes, and line i does not depend on the number of lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tqdm
from PIL import Image
from pydantic import Field

from tools.examples.grid_questions import ASK, BLANK, Turn, draw_cells
from tools.examples.make_digits import SHIFTS, load_digits_split, shift
from zoo.config import Config, UserError

SPLITS = ("train", "validation", "test")
SHIFTED = 0.6
"""Share of training digits moved by one pixel."""
SHARES = {"cell": 1, "count": 1, "which": 3}
"""How often a training turn is of each kind, while there are questions of it; `beside` as its option says."""


class GridsConfig(Config):
    """What is written. Sizes are in pictures, cells and display pixels."""

    train: Annotated[int, Field(ge=1)] = 8000
    validation: Annotated[int, Field(ge=1)] = 300
    test: Annotated[int, Field(ge=1)] = 500
    rows: Annotated[int, Field(ge=1, le=9)] = 4
    columns: Annotated[int, Field(ge=1, le=9)] = 4
    frames: Annotated[int, Field(ge=0, le=99)] = 0
    scale: Annotated[int, Field(ge=1)] = 4
    turns: Annotated[int, Field(ge=1)] = 16
    beside: Annotated[int, Field(ge=0)] = 0
    least: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def axes(self) -> tuple[tuple[str, int], ...]:
        """(name, length) of each direction of a grid, outermost first."""
        frames = (("frame", self.frames),) if self.frames else ()
        return (*frames, ("row", self.rows), ("column", self.columns))

    @property
    def shares(self) -> dict[str, int]:
        """Kinds that are asked, and how often in training."""
        return SHARES | ({"beside": self.beside} if self.beside else {})


def load_pools() -> dict[str, tuple[np.ndarray, ...]]:
    """The digits of each split by class: ten arrays (n, 8, 8) uint8 for each of `SPLITS`."""
    from sklearn.model_selection import train_test_split  # slow to import

    images, labels, test_images, test_labels = load_digits_split()
    train, val = train_test_split(np.arange(len(labels)), train_size=1200, stratify=labels, random_state=0)
    parts = {"train": (images[train], labels[train]), "validation": (images[val], labels[val])}
    parts["test"] = (test_images, test_labels)
    return {split: tuple(x[y == digit] for digit in range(10)) for split, (x, y) in parts.items()}


def paint(
    rng: np.random.Generator, cells: np.ndarray, pool: tuple[np.ndarray, ...], scale: int, shifted: float
) -> np.ndarray:
    """The picture (R·8·scale, C·8·scale) uint8 of one frame's `cells` (R, C), each digit a draw from `pool`.

    Args:
        shifted: probability that a digit is moved by one of its own pixels.
    """
    picture = np.zeros((cells.shape[0] * 8, cells.shape[1] * 8), np.uint8)
    for (row, column), digit in np.ndenumerate(cells):
        if digit != BLANK:
            image = pool[digit][rng.integers(len(pool[digit]))]
            if rng.random() < shifted:
                image = shift(image, *SHIFTS[rng.integers(len(SHIFTS))])
            picture[row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] = image
    return picture.repeat(scale, 0).repeat(scale, 1)


@dataclasses.dataclass(frozen=True)
class Line:
    """One grid, or sequence of frames, and what is asked of it."""

    cells: np.ndarray
    """Digits 0..9, or `BLANK`: (R, C), or (F, R, C) of frames."""
    pictures: list[np.ndarray]
    """(height, width) uint8 of each frame; without frames, one."""
    turns: list[Turn]


def make_line(config: GridsConfig, pool: tuple[np.ndarray, ...], split: str, index: int) -> Line:
    """Line `index` of a split: `config.turns` turns, or all that can be asked, for training; else one of each kind."""
    rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
    names = [name for name, _ in config.axes]
    cells = draw_cells(rng, config.axes, config.least if split == "train" else None)
    asked = {kind: ASK[kind](rng, cells, names) for kind in config.shares}
    if split == "train":
        turns = list(_mixed(rng, asked, config.shares, config.turns))
    else:
        turns = [turn for each in asked.values() for turn in itertools.islice(each, 1)]
    frames = cells if config.frames else cells[None]
    shifted = SHIFTED if split == "train" else 0
    return Line(cells, [paint(rng, frame, pool, config.scale, shifted) for frame in frames], turns)


def write(folder: Path, config: GridsConfig) -> dict[str, dict[str, int]]:
    """Write all splits, showing progress; where the folder already holds them, nothing is done.

    Returns:
        pictures (or sequences of frames) and questions of each split.
    Raises:
        UserError: the folder holds grids made with other settings.
    """
    marker, settings = folder / "digit_grids.json", config.model_dump()
    if marker.exists():
        made = json.loads(marker.read_text())
        before = GridsConfig.parse(made["settings"]).model_dump()
        other = [f"{key} {before[key]}" for key, value in settings.items() if before[key] != value]
        if other:
            raise UserError(f"{folder} holds grids made with {', '.join(other)}; give the same or another folder")
        return made["written"]
    pools = load_pools()
    written = {}
    for split in SPLITS:
        (folder / split).mkdir(parents=True, exist_ok=True)
        count = getattr(config, split)
        written[split] = {"pictures": count, "questions": 0}
        with (folder / f"{split}.jsonl").open("w") as file:
            for index in tqdm.trange(count, desc=f"{split} grids", disable=None, leave=False):
                for line in _save(folder, config, pools[split], split, index):
                    file.write(json.dumps(line) + "\n")
                    written[split]["questions"] += len(line.get("turns", [line]))
    marker.write_text(json.dumps({"settings": settings, "written": written}))  # last: where it is, all is whole
    return written


def _save(folder: Path, config: GridsConfig, pool: tuple, split: str, index: int) -> Iterator[dict[str, Any]]:
    """Save the pictures of one grid; yields its lines."""
    made = make_line(config, pool, split, index)
    files = [f"{split}/{index:06d}{f'-{k}' if config.frames else ''}.png" for k in range(len(made.pictures))]
    for file, picture in zip(files, made.pictures, strict=True):
        Image.fromarray(picture).save(folder / file)
    shown = {"images": files} if config.frames else {"image": files[0]}
    asked = [{"turns": made.turns}] if split == "train" else made.turns
    yield from ({**shown, **each, "cells": made.cells.tolist()} for each in asked)


def _mixed(
    rng: np.random.Generator, asked: dict[str, Iterator[Turn]], shares: dict[str, int], count: int
) -> Iterator[Turn]:
    """`count` turns of random kinds; fewer where all kinds are exhausted."""
    left = dict(shares)
    while left and count:
        share = np.array(list(left.values()))
        kind = list(left)[rng.choice(len(left), p=share / share.sum())]
        if turn := next(asked[kind], None):
            count -= 1
            yield turn
        else:
            del left[kind]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    helps = {
        "train": "training pictures",
        "validation": "validation pictures",
        "test": "test pictures",
        "rows": "rows of a grid",
        "columns": "columns of a grid",
        "frames": "frames of a sequence; 0 for single pictures",
        "scale": "display pixels of a digit's pixel; a cell is 8 of those wide",
        "turns": "questions of a training picture",
        "beside": "how often what shares a row or column with a digit is asked, beside cells' once; 0: never",
        "least": "digits on the emptiest training grids",
        "seed": "of everything drawn",
    }
    for key, help_ in helps.items():
        default = GridsConfig.model_fields[key].default
        parser.add_argument(f"--{key}", type=type(default), default=default, help=f"{help_} (default: {default})")
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    try:
        written = write(folder, GridsConfig.parse(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = (f"{v['questions']:,} questions on {v['pictures']:,} {split} grids" for split, v in written.items())
    print(f"{folder}: {', '.join(counts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
