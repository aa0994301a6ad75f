"""A contact sheet: documents as rows, their texts and pictures from left to right, as the model will see them."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from pretrain.data.sources import Document
from tools.make_shards.measure import Measure

ROWS, PARTS = 16, 6
"""Documents of a sheet, and parts that are shown of each."""
SIDE, MARGIN, SIZE = 128, 8, 11
"""Pixels: height of a row, space between parts, height of the letters."""
WIDE = {"text": 232, "image": SIDE}
"""Pixels: width of a part."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A document as the sheet shows it."""

    place: str
    """Hash of the document; the lowest are shown."""
    key: str
    parts: list[str | np.ndarray]
    """Texts, and pictures (H, W, 3)."""
    more: int
    """Parts besides these."""


def drawn(place: str, document: Document, measure: Measure) -> Drawn:
    """The beginning of a document, whose bytes have been read, in a form that is small."""
    contents = document.contents().parts
    parts: list[str | np.ndarray] = []
    for part in contents[:PARTS]:
        if part.type == "image":
            parts.append(_small(measure.picture(part.read())))
        else:
            parts.append(
                part.read()[:4096].decode("utf-8", "ignore")[:1024] if part.type == "text" else f"({part.type})"
            )
    return Drawn(place, document.key, parts, len(contents) - len(parts))


def draw_sheet(documents: Sequence[Drawn], path: Path) -> None:
    """Write a PNG of the documents."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), SIZE)
    width = MARGIN + PARTS * (WIDE["text"] + MARGIN)
    sheet = Image.new("RGB", (width, max(1, len(documents)) * (SIDE + 2 * MARGIN + SIZE)), "white")
    pen, right = ImageDraw.Draw(sheet), 0
    for row, document in enumerate(documents):
        top, left = row * (SIDE + 2 * MARGIN + SIZE) + MARGIN, MARGIN
        more = f" … and {document.more} parts more" if document.more > 0 else ""
        pen.text((left, top), document.key[:120] + more, "grey", font)
        for part in document.parts:
            if isinstance(part, str):
                lines = [line for each in part.splitlines() or [""] for line in textwrap.wrap(each, 36) or [""]]
                fitting = SIDE // (SIZE + 2)
                shown = lines[:fitting] if len(lines) <= fitting else [*lines[: fitting - 1], "…"]
                pen.multiline_text((left, top + SIZE + 4), "\n".join(shown), "black", font, spacing=1)
            else:
                sheet.paste(Image.fromarray(part), (left, top + SIZE + 4))
            left += (WIDE["text"] if isinstance(part, str) else part.shape[1]) + MARGIN
        right = max(right, left, MARGIN + round(pen.textlength(document.key[:120] + more, font)))
    sheet.crop((0, 0, min(right + MARGIN, width), sheet.height)).save(path)


def _small(picture: np.ndarray) -> np.ndarray:
    """A picture in the height of a row; one that has fewer pixels is enlarged without smoothing, so that all show."""
    image = Image.fromarray(picture)
    scale = min(SIDE / image.height, WIDE["text"] / image.width)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS))
