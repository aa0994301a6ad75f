"""The folder in which indexes and trained tokenizers are kept: choosing and locking it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from pretrain.data.errors import DataError
from zoo.files import remove_leftovers

HIDDEN = ".index"
"""Name of the cache inside a data folder."""
SHARED = "shared"
"""Name of the cache, below the user's, of whatever has no data folder of its own."""
PAUSE = 30.0
"""Seconds from one message of a process that waits to the next."""


def cache_folder(data: Path | None, wanted: str | None) -> Path:
    """A writable folder, made if need be: `wanted`, else one inside `data`, else one under the user's cache
    folder.

    Args:
        data: the folder in which the data lie; None where they have none, or several.
    Raises:
        DataError: none of them can be written.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pretrain-data"
    if wanted is not None:
        candidates = [Path(wanted)]
    elif data is None:
        candidates = [user / SHARED]
    else:
        candidates = [data / HIDDEN, user / hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:16]]
    reasons = []
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell: root, read-only mounts
            return folder
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror}")
    raise DataError(
        f"data.cache: no folder to keep the index in ({'; '.join(reasons)}); set data.cache to a writable one"
    )


class Waiting:
    """What the process that holds the lock of a cache tells those that wait for it.

    Args:
        folder: the cache.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "progress"
        self._told = time.monotonic()

    def tell(self, text: str) -> None:
        """Leave a line, a few times a minute at most."""
        if time.monotonic() - self._told > PAUSE / 3:
            self._told = time.monotonic()
            self._path.write_text(text)

    def read(self) -> str:
        """The last line; empty without one."""
        try:
            return self._path.read_text()
        except OSError:
            return ""


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[Waiting]:
    """Let one process at a time through; the others wait, and say now and then for what. The lock ends with its
    process, however that ends."""
    lock, waiting = filelock.FileLock(folder / "lock"), Waiting(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for another process that is indexing into {folder}")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=PAUSE)
            except filelock.Timeout:
                log(f"still waiting: {waiting.read() or 'it has not said how far it is'}")
    try:
        with alone(folder) as nobody_else:
            if nobody_else:
                remove_leftovers(folder)
                (folder / "progress").unlink(missing_ok=True)
        with writing(folder):
            yield waiting
    finally:
        lock.release()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep others from taking what this process is writing into the cache for the leftovers of a killed one."""
    with open(folder / "writers", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Whether no process is writing into the cache; none begins to while this lasts."""
    with open(folder / "writers", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def room_for(folder: Path, key: str = "data.cache") -> Iterator[None]:
    """Say which disk it is where what is written into `folder` does not fit.

    Args:
        key: what names the folder.
    Raises:
        DataError: the disk is full, or a quota or a limit on the size of files is reached.
    """
    try:
        yield
    except OSError as error:
        # NumPy says what it could not write, but not why
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or re.search(r"\d+ requested and \d+ written", str(error)):
            raise DataError(
                f"{key}: the disk of {folder} is full ({error.strerror or error}); free space, or set {key} to a "
                "folder on another disk, and give the same command again"
            ) from None
        raise
