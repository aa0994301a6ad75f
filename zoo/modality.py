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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from zoo.carries import Carries, Ids
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


@dataclasses.dataclass(frozen=True)
class Following:
    """What may follow in an item."""

    ids: tuple[int, int] | None
    """[start, stop) of the ids of another position, counted from 0; None: no position may follow."""
    end: bool
    """The item may end here."""


class ModalityConfig(BlockConfig):
    """What is known of a modality without data. A kind sets the class variables and says `carries` and `positions`."""

    part: ClassVar[str]
    """Type of the part of a document that this modality reads; see `PARTS`."""
    suffix: ClassVar[str]
    """Ending of a file that a person can open, such as ".png"; what `Modality.write` makes."""
    shorten: ClassVar[str] = ""
    """How to make an item take fewer positions, for messages: "make patch larger"."""
    file: ClassVar[str | None] = None
    """Ending of the file that `path` names and the modality needs beside its config; "" where that is a folder; None
    where it needs neither."""

    def beside(self, place: Path) -> Self:
        """The same config for what `Modality.save` has written at `place` and the ending `file`."""
        return self if self.file is None else self.model_copy(update={"path": f"{place}{self.file}"})

    def open(self) -> Modality:
        """The modality ready for use, with what stands at `path`, if it needs that.

        Raises:
            UserError: that is missing, is of another kind, or does not fit the config.
        """
        return self.block(self)

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

    def following(self, before: Sequence[Any]) -> Following:
        """What may follow in an item that is being written; by default any id, and its end, as `positions` has it.

        Args:
            before: what its positions carry so far.
        """
        positions, carries = self.positions, self.carries
        assert positions is not None, "what may be cut anywhere has no end of its own"
        ids = (0, carries.size if isinstance(carries, Ids) else 1) if len(before) < positions.most else None
        return Following(ids, len(before) >= positions.least)

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

    def open(self) -> LearnedModality:
        if self.path is None:
            raise ValueError("it has not learned anything yet: fit it, or name its file in `path`")
        return self.load(self.path)

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
        """Hash of everything that decides what `encode` returns, wherever its file lies."""
        said = self.config.model_dump(mode="json", exclude={"path"})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @abc.abstractmethod
    def encode(self, item: Any) -> np.ndarray:
        """What the n positions of an item carry: ids (n,), vectors (n, width), or channels (n, count)."""

    @abc.abstractmethod
    def decode(self, content: np.ndarray) -> Any:
        """The item that positions stand for, as nearly as they tell it; the inverse of `encode`."""

    @abc.abstractmethod
    def write(self, item: Any) -> bytes:
        """The item as the content of a file that ends in `Config.suffix`."""

    def save(self, path: str | Path) -> None:
        """Write what the modality needs beside its config to a file, or into a new folder, for `Config.open`."""
        raise NotImplementedError(f"{type(self).__qualname__} has a `file` in its config, but no save(path)")


class LearnedModality(Modality):
    """A modality that has learned something."""

    @abc.abstractmethod
    def save(self, path: str | Path) -> None:
        """Write what was learned to a file, for `LearnedConfig.load`."""
