"""Documents of a source as tar shards, the same whoever writes how much of them.

A *piece* is what one process writes at a time: a stretch of one of the source's shards. It leaves a tar file without an
end for each split, and these, joined in order, are the shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.sources import Contents, Document, Shard, Source, share
from tools.make_shards.measure import DROPPED, LOST, Measure, Summary, held, reason_kind
from tools.make_shards.sheet import ROWS, Drawn, drawn

PIECE = 16 << 20
"""Bytes of a source's file that are a piece, about."""
BLOCK, RECORD = 512, 10_240
"""Bytes: a tar file's unit, and what its length is a multiple of."""
MAGIC = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tiff",
    b"MM\0*": "tiff",
    b"fLaC": "flac",
    b"OggS": "ogg",
    b"ID3": "mp3",
    b"\xff\xfb": "mp3",
}
"""First bytes of a file → what it is called."""
RIFF = {b"WEBP": "webp", b"WAVE": "wav"}


@dataclasses.dataclass(frozen=True)
class Job:
    """What is written, and how."""

    source: Source
    shards: Sequence[Shard]
    folder: Path
    """Where the shards are written to."""
    hold_out: float
    """Share of the documents, by hash of what they hold, that are held out."""
    measure: Measure


@dataclasses.dataclass(frozen=True)
class Piece:
    """Stretch `number` of `count` equal ones of the documents of a shard."""

    shard: int
    number: int
    count: int


@dataclasses.dataclass(frozen=True)
class Written:
    """What became of a piece."""

    files: dict[str, Path]
    """By split: a tar file without an end."""
    summary: Summary
    drawn: list[Drawn]
    """Those of its documents that a contact sheet may show."""


def pieces(shards: Sequence[Shard]) -> list[Piece]:
    """The pieces of all shards, in order; a function of the files alone."""
    found = []
    for number, shard in enumerate(shards):
        size = 0 if shard.remote or shard.files else Path(shard.url).stat().st_size
        count = max(1, -(-size // PIECE))
        found += [Piece(number, n, count) for n in range(count)]
    return found


class Worker:
    """Writes pieces, and keeps the shard open that the last one was of."""

    def __init__(self, job: Job, cache: Path) -> None:
        self.job, self.cache = job, cache
        self._open = contextlib.ExitStack()
        self._shard = -1
        self._documents: Sequence[Document] = []

    def write(self, piece: Piece) -> Written:
        """Write a piece.

        Raises:
            DataError: its shard cannot be read.
        """
        shard = self.job.shards[piece.shard]
        if piece.shard != self._shard:
            self.close()
            self._documents = self._open.enter_context(self.job.source.open(shard, self.cache))
            self._shard = piece.shard
        total = len(self._documents)
        first, stop = (n * total // piece.count for n in (piece.number, piece.number + 1))
        summary, lowest = Summary(), []
        name = f"{piece.shard:05}-{piece.number:05}"
        with _Tars(self.job.folder, name) as tars:
            for number in range(first, stop):
                document = self._documents[number]
                try:
                    whole, losses = held(document)
                    self.job.measure.look(whole, summary)
                except BrokenDocument as broken:
                    example = shown(f"{shard.name}: {document.key}: {broken}", 300)
                    summary.count(DROPPED, reason_kind(str(broken)), example=example)
                    continue
                except RecursionError:
                    summary.count(DROPPED, "its JSON is nested too deeply", example=shown(document.key))
                    continue
                for loss in losses:
                    summary.count(LOST, loss.kind, example=shown(f"{shard.name}: {document.key}: {loss.example}", 300))
                place = digest(whole.contents())
                split = "val" if share(place, "validation") < self.job.hold_out else "train"
                summary.count("documents", split)
                tars.add(split, f"{piece.shard:05}-{number:08}", whole)
                lowest = heapq.nsmallest(ROWS, [*lowest, (place, number, whole)])
        if piece.number + 1 == piece.count and shard.remote:
            self.close()
            shard.release(self.cache)
        return Written(tars.files, summary, [drawn(place, each, self.job.measure) for place, _, each in lowest])

    def close(self) -> None:
        """Let go of the open shard."""
        self._open.close()
        self._shard = -1


class _Tars:
    """A tar file without an end for each split that has a document."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self.files: dict[str, Path] = {}
        self._open: dict[str, tuple[BinaryIO, tarfile.TarFile]] = {}

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *_: object) -> None:
        for file, tar in self._open.values():
            tar.fileobj = io.BytesIO()  # what closing would write, the end, comes once for all pieces
            tar.close()
            file.close()

    def add(self, split: str, key: str, document: Document) -> None:
        """Write a document."""
        if split not in self._open:
            self.files[split] = self._folder / f"{self._name}.{split}.piece"
            file = open(self.files[split], "wb")
            self._open[split] = file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT)
        tar = self._open[split][1]
        for name, content in members(key, document):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
            # tarfile keeps every header that it has written
            tar.members = []  # pyrefly: ignore[missing-attribute]


def members(key: str, document: Document) -> Iterator[tuple[str, bytes]]:
    """The files of a document: name in the tar file, content."""
    parts, files = [], []
    for number, part in enumerate(document.contents().parts):
        content = part.read()
        if part.type == "text":
            parts.append({"type": "text", "text": content.decode()})
        else:
            file = f"{number}.{ending(content, part.name)}"
            parts.append({"type": part.type, "file": file})
            files.append((f"{key}.{file}", content))
    described = {"parts": parts, "source": document.key.encode("utf-8", "replace").decode()}
    yield f"{key}.json", json.dumps(described, ensure_ascii=False).encode()
    yield from files


def digest(contents: Contents) -> str:
    """Hash of what a document holds."""
    parts = [[part.type, hashlib.sha256(part.read()).hexdigest()] for part in contents.parts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def ending(content: bytes, name: str) -> str:
    """What a file is called, by its first bytes, else as it was."""
    if content[:4] == b"RIFF" and content[8:12] in RIFF:
        return RIFF[content[8:12]]
    known = next((ending for magic, ending in MAGIC.items() if content.startswith(magic)), None)
    suffix = PurePath(name).suffix[1:].lower()
    return known or (suffix if suffix.isascii() and suffix.isalnum() and suffix != "json" else "bin")


class Joined:
    """Shards of one split, joined from pieces in order.

    Args:
        limit: bytes of a shard, about; one piece is never divided.
    """

    def __init__(self, folder: Path, split: str, limit: int) -> None:
        self._folder, self._split, self._limit = folder, split, limit
        self.shards: list[Path] = []
        self._file: BinaryIO | None = None

    def add(self, piece: Path) -> None:
        """Append a piece, and remove it."""
        size = piece.stat().st_size
        if self._file is not None and self._file.tell() + size > self._limit:
            self.close()
        if self._file is None:
            self.shards.append(self._folder / f"{self._split}-{len(self.shards):05}.tar")
            self._file = open(self.shards[-1], "wb")
        with open(piece, "rb") as content:
            while chunk := content.read(1 << 20):
                self._file.write(chunk)
        piece.unlink()

    def close(self) -> None:
        """Write the end of a shard."""
        if self._file is not None:
            self._file.write(bytes(2 * BLOCK))
            self._file.write(bytes(-self._file.tell() % RECORD))
            self._file.close()
            self._file = None
