"""The files inside an open tar shard, for any number of threads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.shards import Entry
from pretrain.data.tar import UNREADABLE


class Members:
    """An open tar shard.

    Args:
        descriptor: of the open file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    @contextlib.contextmanager
    def opened(cls, file: Path) -> Iterator[Members]:
        """The members of a tar file, until the context ends."""
        with open(file, "rb", buffering=0) as tar:
            yield cls(tar.fileno())

    def read(self, entry: Entry, extension: str) -> bytes:
        """The bytes of one file of a document.

        Raises:
            BrokenDocument: it has no such file, or the file does not lie in the shard.
        """
        member = entry.find(extension)
        if member is None:
            raise BrokenDocument(f"its file {shown(f'{entry.key}.{extension}')} is missing")
        if member.size == UNREADABLE:
            raise BrokenDocument(
                f"its file {shown(f'{entry.key}.{extension}')} is a link that leads nowhere, a device or a sparse file"
            )
        content = bytearray()
        while len(content) < member.size:  # one call reads at most 2 GiB
            run = os.pread(self._descriptor, member.size - len(content), member.offset + len(content))
            if not run:
                raise BrokenDocument(f"its file {shown(f'{entry.key}.{extension}')} ends too early; it has changed")
            content += run
        return bytes(content)
