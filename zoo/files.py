"""Files that are whole or not there, however a writer ends: killed, out of space, or without power.

A writer fills a temporary beside the target, named `<target>.<process id>.writing`. Its bytes are on the disk before it
takes the target's place by a rename. What a killed writer leaves has such a name and no other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`: fill it with a file or a folder, and it takes the target's place at the end.

    A file replaces its predecessor in one instant. A folder's predecessor is removed first. Where the body raises,
    the temporary is removed and `target` stays as it was.

    Args:
        target: its folder must exist.
    """
    temporary = target.with_name(f"{target.name}.{os.getpid()}.writing")
    _remove(temporary)
    try:
        yield temporary
        sync(temporary)
        if temporary.is_dir():
            _remove(target)
        os.replace(temporary, target)
        sync(target.parent, contents=False)
    except BaseException:
        _remove(temporary)
        raise


def atomic_write(target: Path, content: str | bytes) -> None:
    """Make `content` all that `target` holds; text is UTF-8. Its folder must exist."""
    with atomic_path(target) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def open_here(path: Path, flags: int) -> int:
    """A file descriptor for writing `path`, which is made where absent; `flags` are those of `os.open`.

    Raises:
        OSError: also where `path` is a link: in a folder from elsewhere it may lead to any file of the user's.
    """
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def remove_leftovers(folder: Path, targets: str = ".+") -> None:
    """Remove what killed writers left in `folder`. Nobody may be writing there: hold the folder's lock.

    Args:
        targets: pattern (re) of the names whose leftovers are meant.
    """
    pattern = re.compile(rf"({targets})\.\d+\.writing")
    for entry in list(folder.iterdir()):
        if pattern.fullmatch(entry.name):
            _remove(entry)


def sync(path: Path, contents: bool = True) -> None:
    """Put a file, or a folder with all below it, on the disk.

    Args:
        contents: False for a folder's own list of names alone, after a rename in it.
    """
    if contents and path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
