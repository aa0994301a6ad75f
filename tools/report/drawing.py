"""A routed document as HTML: a line of its tokens for each routed layer, pictures with what each layer kept of them
laid over, and the colour of the expert that took each token. A click on a token says where it went."""

from __future__ import annotations

import dataclasses
import math
import mimetypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tools.pages import data_url, environment
from tools.report.routing import Item, Routed, group_of
from zoo.run import Run

TEMPLATES = Path(__file__).with_name("templates")
COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#bfef45", "#f032e6", "#9a6324", "#469990")
"""Colours of experts, by number; after the last the first comes again."""
SIDE = 112
"""Pixels of the side of a picture."""
TICK = 5
"""Pixels of a position of an item that is no picture."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A position of an item, or a token that stands by itself."""

    token: int
    skipped: bool
    color: str
    label: str = ""
    marker: bool = False
    grid: bool = False


@dataclasses.dataclass(frozen=True)
class Grid:
    """The positions of an item, in rows."""

    places: list[Place]
    rows: int
    columns: int
    width: int
    height: int
    picture: str
    sound: str
    grid: bool = True


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the document."""

    name: str
    cells: list[Place | Grid]


def style_and_script() -> tuple[Markup, Markup]:
    """What a page needs once to show routed documents."""
    module: Any = environment(TEMPLATES).get_template("routed.html").module
    return module.style(), module.script()


def draw(run: Run, routed: Routed) -> Markup:
    """A routed document; see `style_and_script`."""
    rows = [Row("as the model sees it", _cells(run, routed, None, None))]
    for layer, names in routed.layers().items():
        for name in (name for name in names if name in routed.passed):
            share = routed.passed[name].mean()
            rows.append(Row(f"layer {layer}: {share:.0%} pass", _cells(run, routed, routed.passed[name], None)))
        groups = [name for name in names if name in routed.experts]
        if groups:
            kept = next((routed.passed[name] for name in names if name in routed.passed), None)
            what = ", ".join(map(group_of, groups))
            rows.append(Row(f"layer {layer}: experts of {what}", _cells(run, routed, kept, _colours(routed, groups))))
    paths = [routed.path(token) for token in range(len(routed.labels))]
    module: Any = environment(TEMPLATES).get_template("routed.html").module
    return module.document({"rows": rows, "paths": paths})


def colour(expert: int, strength: float = 0.6) -> str:
    """The colour of an expert, as CSS has it."""
    return f"{COLOURS[expert % len(COLOURS)]}{round(255 * strength):02x}"


def _colours(routed: Routed, groups: Sequence[str]) -> list[str]:
    """(T) CSS background of each token: the colours of its experts side by side."""
    found = []
    for token in range(len(routed.labels)):
        taken = [expert for name in groups for expert in np.flatnonzero(routed.experts[name][token]).tolist()]
        stops = [
            f"{colour(expert)} {100 * n / len(taken):.0f}% {100 * (n + 1) / len(taken):.0f}%"
            for n, expert in enumerate(taken)
        ]
        found.append(f"linear-gradient(90deg, {', '.join(stops)})" if stops else "")
    return found


def _cells(run: Run, routed: Routed, passed: np.ndarray | None, colours: Sequence[str] | None) -> list[Place | Grid]:
    text = list(run.modalities).index(run.vocabulary.text)
    places = [
        Place(
            token,
            passed is not None and not passed[token],
            "" if colours is None else colours[token],
            label,
            label in run.vocabulary.specials or routed.modality[token] != text,
        )
        for token, label in enumerate(routed.labels)
    ]
    cells: list[Place | Grid] = []
    done = 0
    for item in routed.items:
        cells += [*places[done : item.start], _grid(run, item, places[item.start : item.stop])]
        done = item.stop
    return [*cells, *places[done:]]


def _grid(run: Run, item: Item, places: list[Place]) -> Grid:
    """An item in rows: a picture in those of its patches, anything else in one."""
    modality: Any = run.modalities[item.part.modality]
    kind = mimetypes.types_map.get(modality.config.suffix, "")
    file = data_url(modality.write(item.part.item), kind) if kind.startswith(("image/", "audio/")) else ""
    shape = grid_shape(modality, item.part.item, len(places))
    if shape is None:
        sound = file if kind.startswith("audio/") else ""
        return Grid(places, 1, len(places), TICK * len(places), 24, "", sound)
    rows, columns = shape
    height, width = (round(SIDE * side / max(shape)) for side in shape)
    # a mark before the codes, which says a picture's size, has no place in it
    return Grid(places[len(places) - rows * columns :], rows, columns, width, height, file, "")


def grid_shape(modality: Any, item: Any, positions: int) -> tuple[int, int] | None:
    """Rows and columns of the patches of a picture; None of anything else."""
    if modality.config.part != "image" or not isinstance(item, np.ndarray):
        return None
    ratio = item.shape[0] / item.shape[1]
    for count in (positions, positions - 1):
        rows = round(math.sqrt(count * ratio))
        if rows and rows * (count // rows) == count and abs(rows / (count // rows) - ratio) < 0.01:
            return rows, count // rows
    return None
