"""A user's own modality, as a recipe imports it: drawings of a pen. And documents that have some."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic

import zoo
from tests.pretrain.data.samples import write_shard
from zoo.modalities import Modality, ModalityConfig, Positions, Vectors


@zoo.register("modality", "pen_strokes")
class Strokes(Modality):
    """Points of a pen: how far it goes, and whether it draws; as many as the drawing has."""

    class Config(ModalityConfig):
        part: ClassVar[str] = "drawing"
        suffix: ClassVar[str] = ".svg"
        most: int = pydantic.Field(default=32, gt=0)
        """Points of a drawing at most."""

        @property
        def carries(self) -> Vectors:
            return Vectors(3)

        @property
        def positions(self) -> Positions:
            return Positions(1, self.most)

        def read(self, content: bytes) -> np.ndarray:
            return np.array(json.loads(content), np.float32).reshape(-1, 3)

    def encode(self, item: np.ndarray) -> np.ndarray:
        return item

    def decode(self, content: np.ndarray) -> np.ndarray:
        return np.concatenate([content[:, :2], content[:, 2:] > 0.5], axis=1).astype(np.float32)

    def write(self, item: np.ndarray) -> bytes:
        points = "".join(f"{'l' if pen else 'm'}{dx:g},{dy:g} " for dx, dy, pen in item)
        return f'<svg xmlns="http://www.w3.org/2000/svg"><path fill="none" d="m0,0 {points}"/></svg>'.encode()


def polygon(corners: int, number: int) -> list[list[float]]:
    """A drawing: the pen goes to a first corner without drawing, then round."""
    turn = 2 * math.pi / corners
    sides = [[math.cos(turn * k + 0.01 * number), math.sin(turn * k + 0.01 * number), 1.0] for k in range(corners)]
    return [[0.1 * (number % 5), 0.0, 0.0], *sides]


def document(key: str, text: str, drawing: list[list[float]] | None) -> dict[str, bytes]:
    parts: list[dict[str, str]] = [{"type": "text", "text": text}]
    files = {}
    if drawing is not None:
        parts.append({"type": "drawing", "file": "pen"})
        files["pen"] = json.dumps(drawing).encode()
    return {"__key__": key, "json": json.dumps({"parts": parts}).encode(), **files}


def write_documents(folder: Path) -> Path:
    """Shards of captioned polygons; every third document is text alone, and so are whole rows."""
    for split, count, first in (("train", 90, 0), ("val", 20, 500)):
        documents = []
        for n in range(first, first + count):
            corners = 3 + n % 4
            if n % 3:
                documents.append(document(f"{n:03d}", f"{corners} corners", polygon(corners, n)))
            else:
                documents.append(document(f"{n:03d}", "no drawing, only words", None))
        write_shard(folder / f"{split}.tar", documents)
    return folder
