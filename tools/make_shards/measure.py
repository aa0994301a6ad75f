"""What documents hold and lose: counts that add up, whoever made them."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pretrain.data.reading import read_parts, tokenize
from pretrain.data.sources import Content, Document, Loss
from zoo.modalities import LearnedConfig, Modalities, Modality, grammars, vocabulary
from zoo.modalities.pictures import PictureConfig, open_picture

TOKENS, CHARACTERS, ITEMS, SIDES, DROPPED, LOST = "tokens", "characters", "parts", "sides", "dropped", "lost"
"""Kinds of things that are counted."""


@dataclasses.dataclass
class Summary:
    """What some documents are; two of them add up."""

    counts: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    """(kind, of what) → how many."""
    examples: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    """The first of everything that was dropped or lost."""

    def count(self, kind: str, what: str, number: int = 1, example: str = "") -> None:
        """So many more."""
        self.counts[kind, what] += number
        if example:
            self.examples.setdefault((kind, what), example)

    def add(self, other: Summary) -> None:
        """Everything of another, which comes after."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples

    def of(self, kind: str) -> dict[str, int]:
        """What was counted of a kind, most first."""
        found = {what: number for (each, what), number in self.counts.items() if each == kind}
        return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))

    def dump(self) -> dict[str, Any]:
        """Everything, as a file of JSON has it."""
        kinds = dict.fromkeys(kind for kind, _ in self.counts)
        told: dict[str, Any] = {kind: self.of(kind) for kind in kinds if kind not in (DROPPED, LOST)}
        for kind in (DROPPED, LOST):
            told[kind] = {
                what: {"count": number, "example": self.examples.get((kind, what), "")}
                for what, number in self.of(kind).items()
            }
        return told

    def lines(self) -> list[str]:
        """Everything, as a person reads it."""
        told = [
            f"{kind}: " + ", ".join(f"{what} {number:,}" for what, number in self.of(kind).items())
            for kind in ("documents", ITEMS, TOKENS, CHARACTERS)
            if self.of(kind)
        ]
        sides = self.of(SIDES)
        if sides:
            ordered = sorted(sides.items(), key=lambda item: int(item[0].split("-")[0]))
            told.append("short side of pictures, in pixels: " + ", ".join(f"{what}: {n:,}" for what, n in ordered))
        for kind, meaning in (
            (DROPPED, "documents that cannot be used"),
            (LOST, "left out of documents that are used"),
        ):
            found = self.of(kind)
            told.append(f"{meaning}: {sum(found.values()):,}")
            told += [f"  {n:,} × {what}, such as {self.examples.get((kind, what))}" for what, n in found.items()]
        return told


@dataclasses.dataclass(frozen=True)
class Measure:
    """Looks at documents, as the modalities of a recipe do where there is one."""

    modalities: Modalities | None = None
    ready: Mapping[str, Modality] | None = None
    """The same, ready for use; None where one of them is still to learn."""

    @classmethod
    def of(cls, modalities: Modalities | None) -> Measure:
        """That of a recipe's modalities.

        Raises:
            UserError: a file of what one has learned does not fit.
        """
        if modalities is None or any(isinstance(c, LearnedConfig) and c.path is None for c in modalities.values()):
            return cls(modalities)
        return cls(
            modalities,
            {
                name: config.load(config.path)
                if isinstance(config, LearnedConfig) and config.path
                else config.block(config)
                for name, config in modalities.items()
            },
        )

    @property
    def missing(self) -> list[str]:
        """Modalities that are still to learn, so that nobody knows how many tokens there are."""
        if self.ready is not None or self.modalities is None:
            return []
        return [name for name, c in self.modalities.items() if isinstance(c, LearnedConfig) and c.path is None]

    def look(self, document: Document, summary: Summary) -> None:
        """Count what a document holds.

        Args:
            document: its bytes have been read.
        Raises:
            BrokenDocument: it cannot be used: a picture does not decode, a part has no modality.
        """
        found = Summary()
        for part in read_parts(document, {"text": bytes.decode, "image": open_picture}):
            found.count(ITEMS, part.type)
            if part.type == "text":
                found.count(CHARACTERS, "text", len(part.item))
            elif part.type == "image":
                found.count(SIDES, _bucket(min(part.item.size)))
        if self.ready is not None and self.modalities is not None:
            words = vocabulary(self.modalities)
            tokens = tokenize(document, self.ready, grammars(self.modalities)).tokens
            for number, count in enumerate(np.bincount(words.modality_of(tokens), minlength=len(words.modalities))):
                found.count(TOKENS, words.modalities[number], int(count))
        summary.add(found)

    def picture(self, content: bytes) -> np.ndarray:
        """(H, W, 3) uint8: a picture as the model sees it; without a recipe as it is."""
        for name, config in (self.modalities or {}).items():
            if isinstance(config, PictureConfig):
                square = config.read(content)
                if self.ready is not None:
                    square = self.ready[name].decode(self.ready[name].encode(square))
                return np.broadcast_to(np.asarray(square), (*square.shape[:2], 3)).astype(np.uint8)
        return np.asarray(open_picture(content).convert("RGB"))


def reason_kind(reason: str) -> str:
    """A reason without names and numbers, so that equal ones can be counted."""
    found = re.search(r"does not decode|is missing", reason)  # what stands before is the name of a file
    if found:
        return f"a file {found.group()}"
    return re.split(r"[:(\d'\"]", reason, maxsplit=1)[0].strip(" ,") or reason[:40]


def held(document: Document) -> tuple[Document, Sequence[Loss]]:
    """The document with its bytes read, and what it has lost.

    Raises:
        BrokenDocument: it cannot be used.
    """
    contents = document.contents()
    parts = [_held(part) for part in contents.parts]
    return Document(document.key, lambda: contents._replace(parts=parts)), contents.losses


def _held(part: Content) -> Content:
    content = part.read()
    return part._replace(read=lambda: content)


def _bucket(side: int) -> str:
    low = 1 << max(0, side.bit_length() - 1)
    return f"{low}-{2 * low - 1}"
