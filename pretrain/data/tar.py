"""The files inside a tar file, every one of them or an error.

`tarfile` stops without a word at a damaged header in mid-file and at the first end-of-archive marker, and so does every
reader built on it. Here a tar file counts as read only when nothing but zeros is left of it. What `cat a.tar b.tar` has
joined is read as one.
"""

from __future__ import annotations

import dataclasses
import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from pretrain.data.errors import DataError

BLOCK = 512  # bytes; unit of a tar file
UNREADABLE = -1
"""The size of a file that does not lie in the tar file as one run of bytes: a link that leads nowhere, a device, a
sparse file."""


@dataclasses.dataclass(frozen=True, slots=True)
class TarFile:
    """A file inside a tar file."""

    name: str
    """Bytes that are no UTF-8 are lone surrogates, as in Python's file names."""
    offset: int
    """First byte of the content inside the tar file."""
    size: int
    """Bytes, or UNREADABLE."""


def list_tar(path: Path, name: str | None = None) -> list[TarFile]:
    """All files in a tar file, in order; folders are left out. A link is the file it leads to.

    Args:
        name: what messages call it; default: its path.
    Raises:
        DataError: it is empty, truncated, damaged, followed by other bytes, or not a tar file; names
            the file and the byte.
    """
    name, size = name or str(path), path.stat().st_size
    if size == 0:
        raise DataError(f"{name}: the shard is empty (0 bytes); write it again or remove it")
    found: list[tuple[TarFile, str]] = []
    with open(path, "rb") as file:
        start: int | None = 0
        while start is not None:
            for info in _headers(name, _Bounded(file, size), start):
                if not info.isdir():
                    found.append((_file(info), _target(info)))
            start = _next_archive(name, file)
    if any(target for _, target in found):
        places = {posixpath.normpath(each.name): each for each, target in found if not target}
        return [_followed(each, target, places) for each, target in found]
    return [each for each, _ in found]


class _Bounded(io.RawIOBase):
    """A file of which no more is asked than there is: headers may claim any size."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self.file.read(min(size, max(0, self.size - self.file.tell())))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:  # `tarfile` would read the header again and again, or pass over it
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


def _headers(name: str, file: _Bounded, start: int) -> Iterator[tarfile.TarInfo]:
    """What the archive that begins at byte `start` holds; `file` stands at its end afterwards."""
    file.seek(start)
    last = start - 1
    tar = None
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", tarinfo=_Header)
        while (info := tar.next()) is not None:
            if info.size < 0 or tar.offset <= last:
                raise DataError(
                    f"{name}: damaged header at byte {info.offset}: it claims {info.size} bytes; write it again"
                )
            last = tar.offset
            yield info
            # tarfile keeps every header it has met; those of a large shard would fill the memory
            tar.members = []  # pyrefly: ignore[missing-attribute]
    except (tarfile.TarError, ValueError, OverflowError, RecursionError, EOFError) as error:
        # `tarfile` raises whatever its parsing comes upon
        if tar is None and start == 0:
            raise DataError(f"{name}: not a plain tar file ({error}); shards are uncompressed tar files") from None
        raise DataError(_truncated(name, file.size, error)) from None
    if tar.offset == start and start > 0:
        raise DataError(
            f"{name}: the bytes from {start} on, after the end of the archive, are no tar file; write it "
            "again, or cut it there"
        )
    file.seek(tar.offset)


def _next_archive(name: str, file: BinaryIO) -> int | None:
    """The first byte that is not zero of what follows an archive, as the start of its block; None where there is none.

    Raises:
        DataError: the end-of-archive marker, a block of zeros, is missing.
    """
    start = file.tell()
    marker = file.read(BLOCK)
    if len(marker) < BLOCK:
        raise DataError(_truncated(name, os.fstat(file.fileno()).st_size, f"no end-of-archive marker at byte {start}"))
    if marker.strip(b"\0"):
        raise DataError(f"{name}: damaged header at byte {start}, the rest of the shard cannot be read; write it again")
    place = start + BLOCK
    while chunk := file.read(BLOCK * 1024):
        rest = chunk.lstrip(b"\0")
        if rest:
            return place + (len(chunk) - len(rest)) // BLOCK * BLOCK
        place += len(chunk)
    return None


def _file(info: tarfile.TarInfo) -> TarFile:
    whole = info.isreg() and info.sparse is None
    return TarFile(info.name, info.offset_data, info.size if whole else UNREADABLE)


def _target(info: tarfile.TarInfo) -> str:
    """The name of the file that a link leads to, else nothing."""
    if info.issym():
        return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))
    return posixpath.normpath(info.linkname) if info.islnk() else ""


def _followed(file: TarFile, target: str, places: dict[str, TarFile]) -> TarFile:
    found = places.get(target) if target else None
    return file if found is None else TarFile(file.name, found.offset, found.size)


def _truncated(name: str, size: int, why: object) -> str:
    return f"{name}: the shard is truncated, it ends at byte {size} ({why}); copy or write it again"
