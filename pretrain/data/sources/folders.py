"""What sources share whose documents are files of a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import braceexpand

from pretrain.data.errors import DataError
from pretrain.data.sources.files import Shard, folder_state, inside, is_remote
from pretrain.data.sources.source import Source, SourceConfig

GROUP = 1024
"""Files of a folder that are one shard, at most."""


class FolderSource(Source):
    """Base of sources whose documents are files of folders on this machine."""

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        self._states: dict[str, str] = {}  # of a folder, which all shards in it share

    def shards(self) -> list[Shard]:
        paths = self.config.path
        shards = [each for path in ([paths] if isinstance(paths, str) else paths) for each in self._below(path)]
        return list(dict.fromkeys(shards))

    def stamp(self, shard: Shard) -> str:
        """That of all files in the folder: documents name others."""
        if shard.url not in self._states:
            self._states[shard.url] = folder_state(Path(shard.url))
        return self._states[shard.url]

    def _below(self, path: str) -> Iterator[Shard]:
        if is_remote(path):
            raise DataError(
                f"path: {path!r}: {self.config.type_name} reads a folder on this machine; copy it here first"
            )
        for each in [path] if Path(path).exists() else braceexpand.braceexpand(path):
            files = inside(Path(each), self.config.files) if Path(each).is_dir() else []
            if Path(each).is_file():
                each, files = str(Path(each).parent), [Path(each).name]
            if not files:
                raise DataError(
                    f"path: {each!r} holds no file {self.config.files} (looked for from {Path.cwd()}); correct the path"
                )
            yield from (Shard(each, tuple(files[n : n + GROUP])) for n in range(0, len(files), GROUP))
