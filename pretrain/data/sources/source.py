"""What a source promises: it lists shards, and opens each as a sequence of documents.

A source is one class in one file, found by its registered name, `type` in a recipe:

    @register("source", "lines")
    class Lines(Source):
        class Config(SourceConfig):
            files = "*.txt"

        @contextlib.contextmanager
        def open(self, shard, cache):
            lines = shard.local(cache).read_text().splitlines()
            yield [Document(str(number), text(line)) for number, line in enumerate(lines)]

Everything after it (indexing, tokenising, packing, `tools.make_shards`) is the same for all.
"""

from __future__ import annotations

import abc
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, NamedTuple, overload

import pydantic

from pretrain.data.errors import BrokenDocument
from pretrain.data.sources.files import Shard, find_files
from zoo.place import BlockConfig, Configured
from zoo.registry import open_slot


class Content(NamedTuple):
    """One part of a document as it lies in its source."""

    type: str
    """What it is, and so which modality reads it: text, image, audio, video, or a type of a user's own."""
    name: str
    """What messages call it: its file, or which of the texts it is."""
    read: Callable[[], bytes]
    """Gives its bytes, UTF-8 of a text. It may be called from any thread, and raises `BrokenDocument` where there are
    none."""


class Loss(NamedTuple):
    """Something that a document had in its source and that the stream will not have."""

    kind: str
    """The reason, without names, so that equal ones can be counted: "image is not in the folder"."""
    example: str
    """What it was about."""


class Contents(NamedTuple):
    """What a document holds."""

    parts: Sequence[Content]
    losses: Sequence[Loss] = ()
    """What was left out, although the rest is used."""


class Document(NamedTuple):
    """A document in its source; nothing of it is read before it is asked for."""

    key: str
    """Its name, for messages and as the key of what is made of it; the same at every reading."""
    contents: Callable[[], Contents]
    """Reads what it holds. It may be called from any thread, and raises `BrokenDocument` where it cannot be used."""


class Numbered(Sequence[Document]):
    """Documents that are made when they are asked for.

    Args:
        count: how many there are.
        make: gives document `number`, counted from 0; it may be called from any thread.
    """

    def __init__(self, count: int, make: Callable[[int], Document]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, number: int) -> Document: ...
    @overload
    def __getitem__(self, number: slice) -> list[Document]: ...
    def __getitem__(self, number: int | slice) -> Document | list[Document]:
        if isinstance(number, slice):
            return [self._make(each) for each in range(*number.indices(self._count))]
        return self._make(range(self._count)[number])


class SourceConfig(BlockConfig):
    """Base of the configs of sources."""

    largest: ClassVar[int] = 2**53
    path: str | list[str]
    """Files or folders: local ones, URLs that fsspec opens, or `pipe:COMMAND`; `{000..123}` and `*` stand for
    several."""
    files: str = "*"
    """Pattern of the names of the files meant in a folder; `**/` looks below it, braces stand for several."""
    weight: pydantic.PositiveFloat = 1.0
    """Rows of this source in a mixture, relative to those of the others."""
    validation: float | str | None = None
    """What is held out: the pattern of the names of further files in the folder, or a share of the documents, by hash
    of their keys; null for nothing."""

    @pydantic.field_validator("validation")
    @classmethod
    def _is_a_share(cls, validation: float | str | None) -> float | str | None:
        if isinstance(validation, float) and not 0 < validation < 1:
            raise ValueError("must be a share between 0 and 1, a pattern of names, or null")
        return validation

    @pydantic.field_validator("path")
    @classmethod
    def _says_something(cls, path: str | list[str]) -> str | list[str]:
        if not path or (isinstance(path, list) and "" in path):
            raise ValueError("must be a path, or a list of paths")
        return path


class Source(Configured, abc.ABC):
    """Base of the slot `source`: where documents come from, and in which format. Built as `cls(config)`."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    def shards(self) -> list[Shard]:
        """What is read and tokenised independently, in a fixed order; by default each file is one.

        Raises:
            DataError: there is none.
        """
        return [Shard(file) for file in find_files(self.config.path, self.config.files)]

    def stamp(self, shard: Shard) -> str:
        """A text that changes when something that a shard is read from does, made without reading it."""
        return shard.stamp

    @property
    def options(self) -> str:
        """What decides, beside the files, which documents they are: its type, and its keys without places."""
        return json.dumps(
            self.config.model_dump(mode="json", exclude={"path", "files", "weight", "validation"}), sort_keys=True
        )

    @abc.abstractmethod
    def open(self, shard: Shard, cache: Path) -> AbstractContextManager[Sequence[Document]]:
        """The documents of a shard, by number and one after the other; their order and keys are the same at every
        opening. They may be read from several threads until the context ends.

        Args:
            cache: folder for copies of what is remote or compressed; see `Shard.local`.
        Raises:
            DataError: on entering, where the shard as a whole cannot be used; names the file and the way out.
        """

    def identity(self, shard: Shard, cache: Path) -> str:
        """Hash of what the documents of a shard are, wherever and in whatever file they lie; it reads all of them.

        Raises:
            DataError: as `open`.
        """
        digest = hashlib.sha256()
        with self.open(shard, cache) as documents:
            for document in documents:
                digest.update(_hash(document.key.encode("utf-8", "surrogatepass")))
                try:
                    for part in document.contents().parts:
                        digest.update(_hash(part.type.encode("utf-8", "surrogatepass")) + _hash(part.read()))
                except BrokenDocument as broken:
                    digest.update(_hash(str(broken).encode("utf-8", "surrogatepass")))
        return digest.hexdigest()


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def text_part(text: object, number: int = 0) -> Content:
    """A text as a part.

    Raises:
        BrokenDocument: it is no text, or holds lone surrogates, as JSON can spell them.
    """
    if not isinstance(text, str):
        raise BrokenDocument(f'text part {number} has no string "text"')
    try:
        content = text.encode()
    except UnicodeEncodeError as error:
        raise BrokenDocument(f"text part {number} is not valid Unicode ({error.reason})") from None
    return Content("text", f"text part {number}", lambda: content)


def share(key: str, purpose: str) -> float:
    """A number in [0, 1) that is a function of a document's key (or text) and of what it is for, and of nothing
    else."""
    digest = hashlib.sha256(f"{purpose}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


SourceSlot = open_slot("source", Source)
"""Field of a config that holds the config of a source."""
