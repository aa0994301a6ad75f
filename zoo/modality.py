"""What a modality is: which part of a document it reads, how an item becomes positions of the stream, and back.

A kind of modality is one class in one file. Its nested `Config` knows everything that can be known before any data is
seen (what a position carries, how many positions an item takes, what the model may see of it), so that a recipe is
checked and a model is built from it alone. The class itself is ready for use: it encodes and decodes. A kind that
learns something from data (`LearnedConfig`) is made by `fit` or `load`, any other from its config.

    @register("modality", "my_kind")
    class MyKind(Modality):
        class Config(ModalityConfig):
            part = "image"
            ...
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from zoo.carries import Carries
from zoo.place import BlockConfig, Configured

PARTS = ("text", "image", "audio", "video")
"""Types of the parts of a document; a modality of one's own may read parts of another type."""


@dataclasses.dataclass(frozen=True)
class Positions:
    """How many positions an item takes, its begin and end markers apart: from `least` to `most`."""

    least: int
    most: int

    @property
    def fixed(self) -> bool:
        """Every item takes equally many."""
        return self.least == self.most


class ModalityConfig(BlockConfig):
    """What is known of a modality without data. A kind sets the class variables and says `carries` and `positions`."""

    part: ClassVar[str]
    """Type of the part of a document that this modality reads; see `PARTS`."""
    suffix: ClassVar[str]
    """Ending of a file that a person can open, such as ".png"; what `Modality.write` makes."""
    shorten: ClassVar[str] = ""
    """How to make an item take fewer positions, for messages: "make patch larger"."""

    @property
    @abc.abstractmethod
    def carries(self) -> Carries:
        """What a position carries."""

    @property
    @abc.abstractmethod
    def positions(self) -> Positions | None:
        """How many positions an item takes; None where any number does and an item may be cut anywhere, as text may."""

    @property
    def pace(self) -> str:
        """How items become positions, for people: "40 positions a second"; empty where there is nothing to say."""
        return ""

    @abc.abstractmethod
    def read(self, content: bytes) -> Any:
        """An item from the bytes of its file (of text: UTF-8), as the modality sees it.

        Raises:
            Exception: of any kind, where the bytes are no such item. The document is then skipped, counted and named.
        """

    @property
    def bidirectional(self) -> bool:
        """Whether a position sees all of its own item; by default it sees what stands before it, as everywhere else."""
        return False


class LearnedConfig(ModalityConfig):
    """The config of a kind that learns something from items: a codebook, a table of merges."""

    file: ClassVar[str]
    """Ending of the file that keeps what was learned."""
    fit_limit: ClassVar[int] = 1 << 12
    """How much it learns from at most, in the units of `extent`."""
    path: str | None = None
    """The file; null learns it from the training shards."""

    def extent(self, item: Any) -> int:
        """How much of `fit_limit` an item takes."""
        return 1

    @abc.abstractmethod
    def fit(self, items: Iterable[Any]) -> LearnedModality:
        """The modality, having learned from `items`. The same items in the same order give the same one.

        Raises:
            UserError: there are no items to learn from.
        """

    @abc.abstractmethod
    def load(self, path: str | Path) -> LearnedModality:
        """The modality, with what is kept in `path`.

        Raises:
            UserError: the file is missing, is of another kind, or does not fit the config.
        """


class Modality(Configured, abc.ABC):
    """Base of the slot `modality`: one kind of content, ready for use. What is known of it without data stands in its
    nested config.

    Args:
        config: an instance of the nested `Config`.
    """

    Config: ClassVar[type[ModalityConfig]] = ModalityConfig

    def __init__(self, config: ModalityConfig) -> None:
        self.config = config

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides what `encode` returns."""
        return hashlib.sha256(json.dumps(self.config.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @abc.abstractmethod
    def encode(self, item: Any) -> np.ndarray:
        """What the n positions of an item carry: ids (n,), vectors (n, width), or channels (n, count)."""

    @abc.abstractmethod
    def decode(self, content: np.ndarray) -> Any:
        """The item that positions stand for, as nearly as they tell it; the inverse of `encode`."""

    @abc.abstractmethod
    def write(self, item: Any) -> bytes:
        """The item as the content of a file that ends in `Config.suffix`."""


class LearnedModality(Modality):
    """A modality that has learned something."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write what was learned to a file, for `LearnedConfig.load`."""
