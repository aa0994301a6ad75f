"""The folder in which indexes and trained tokenizers are kept: choosing and locking it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from pretrain.data.errors import DataError
from zoo.files import remove_leftovers

HIDDEN = ".index"
"""Name of the cache inside a data folder."""


def cache_folder(data: Path, wanted: str | None) -> Path:
    """A writable folder, made if need be: `wanted`, else one inside `data`, else one under the user's cache
    folder.

    Raises:
        DataError: none of them can be written.
    """
    if wanted is not None:
        candidates = [Path(wanted)]
    else:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:16]
        candidates = [data / HIDDEN, user / "pretrain-data" / name]
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


@contextlib.contextmanager
def locked(folder: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Let one process at a time through; the others wait. The lock ends with its process, however that
    ends."""
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for another process that is indexing into {folder}")
        lock.acquire()
    try:
        remove_leftovers(folder)
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def room_for(folder: Path) -> Iterator[None]:
    """Say which disk it is where what is written into `folder` does not fit.

    Raises:
        DataError: the disk is full, or a quota is used up.
    """
    try:
        yield
    except OSError as error:
        # NumPy says what it could not write, but not why
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or re.search(r"\d+ requested and \d+ written", str(error)):
            raise DataError(
                f"data.cache: the disk of {folder} is full ({error.strerror or error}); free space, or set "
                "data.cache to a folder on another disk, and give the same command again"
            ) from None
        raise
