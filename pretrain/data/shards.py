"""Tar shards on disk: finding them, and listing the documents in them with byte offsets.

`tarfile` stops without a word at a damaged header in mid-file, and so does every reader built on it. Here a
shard counts as read only when reading has ended at the end-of-archive marker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Iterator
from pathlib import Path

from webdataset.tariterators import base_plus_ext

from pretrain.data.errors import DataError

BLOCK = 512  # bytes; unit of a tar file


@dataclasses.dataclass(frozen=True)
class Member:
    """One file of a document."""

    extension: str
    """What follows the key and a dot in the member's name: "json", "0.jpg"."""
    offset: int
    """First byte of the content inside the shard."""
    size: int
    """Length in bytes."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A document as it lies in a shard."""

    key: str
    members: tuple[Member, ...]

    def find(self, extension: str) -> Member | None:
        """The last member with this extension; a tar file may hold several, and the last one counts."""
        return next((m for m in reversed(self.members) if m.extension == extension), None)


def find_shards(folder: Path, pattern: str, key: str) -> list[Path]:
    """Shards in `folder` whose names match `pattern`, sorted by name.

    Raises:
        DataError: the folder is missing, or nothing matches; `key` names the entry of the recipe to correct.
    """
    if not folder.is_dir():
        raise DataError(f"data.path: {str(folder)!r} is not a folder (looked for from {Path.cwd()}); correct data.path")
    shards = sorted(path for path in folder.glob(pattern) if path.is_file())
    if not shards:
        present = sorted(path.name for path in folder.glob("*.tar"))
        there = (
            f"it holds {', '.join(present[:5])}{', …' if len(present) > 5 else ''}"
            if present
            else "it holds no .tar file"
        )
        raise DataError(f"{key}: no shard in {str(folder)!r} matches {pattern!r}; {there}")
    return shards


def scan_shard(path: Path) -> list[Entry]:
    """The documents of a shard, in the order in which they begin.

    Members that are not plain files or whose names have no extension belong to no document.

    Raises:
        DataError: the shard is empty, truncated, damaged or no tar file; names the file and the byte.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the shard is empty (0 bytes); write it again or remove it")
    members: dict[str, list[Member]] = {}
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in _members(tar, path):
                key, extension = base_plus_ext(info.name)
                if key is not None and extension is not None and info.isfile():
                    members.setdefault(key, []).append(Member(extension, info.offset_data, info.size))
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise DataError(f"{path}: not a plain tar file ({error}); shards are uncompressed tar files") from None
    if not members:
        raise DataError(f"{path}: the shard holds no document; write it again or remove it")
    return [Entry(key, tuple(found)) for key, found in members.items()]


def checksum(path: Path) -> str:
    """sha256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            info = tar.next()
        except tarfile.TarError as error:
            if tar.offset == 0:
                raise
            raise DataError(_truncated(path, error)) from None
        if info is None:
            return
        yield info
        # tarfile keeps every header it has met; those of a large shard would fill the memory
        tar.members = []  # pyrefly: ignore[missing-attribute]


def _check_end(path: Path, offset: int) -> None:
    """Raise unless the end-of-archive marker, a block of zeros, stands at byte `offset`."""
    with open(path, "rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise DataError(_truncated(path, f"no end-of-archive marker at byte {offset}"))
    if block.strip(b"\0"):
        raise DataError(
            f"{path}: damaged header at byte {offset}, the rest of the shard cannot be read; write it again"
        )


def _truncated(path: Path, why: object) -> str:
    return f"{path}: the shard is truncated, it ends at byte {path.stat().st_size} ({why}); copy or write it again"
