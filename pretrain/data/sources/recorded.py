"""What sources share whose documents are records in files."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from pretrain.data.errors import shown
from pretrain.data.sources.files import Shard, folder_state
from pretrain.data.sources.media import Folder
from pretrain.data.sources.records import NAMES, Record, open_records
from pretrain.data.sources.source import Content, Contents, Document, Numbered, Source, SourceConfig, share


class RecordsConfig(SourceConfig):
    """Keys of sources whose documents are records in files."""

    files: str = NAMES
    """Pattern of the names of the files meant in a folder; `**/` looks below it, braces stand for several. The ending
    says what a file holds: JSON lines, a JSON list, CSV, parquet, or the Arrow files of Hugging Face's `datasets`."""
    folder: str | None = None
    """Folder in which the files that records name lie, and below which they must; default: that of the file of
    records."""
    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """What stands between the values of a CSV file; null: a comma, in `.tsv` a tab."""
    columns: list[str] = Field(default_factory=list)
    """Columns of a CSV file whose first line does not name them."""


class RecordSource(Source):
    """Base of sources whose documents are records in files; each says what becomes of a record."""

    config: RecordsConfig

    def __init__(self, config: RecordsConfig) -> None:
        super().__init__(config)
        self._states: dict[Path, str] = {}  # of a folder, which all shards in it share

    @abc.abstractmethod
    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        """What a record holds.

        Args:
            key: of the document.
            folder: in which files that it names are looked for.
        Raises:
            BrokenDocument: it cannot be used.
        """

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        stem = shard.name.split(".")[0]
        folder = Folder(self._root(shard))
        options = {"delimiter": self.config.delimiter, "columns": self.config.columns}
        with open_records(shard.local(cache), shown(shard.name), **options) as records:

            def make(number: int) -> Document:
                key = f"{stem}-{number:08}"
                return Document(key, lambda: self.contents(key, records.read(number), folder))

            yield Numbered(len(records), make)

    def stamp(self, shard: Shard) -> str:
        """That of the file, and of all files in the folder that its records may name."""
        root = self._root(shard)
        if root is not None and root not in self._states:
            self._states[root] = folder_state(root)
        return shard.stamp if root is None else shard.stamp + self._states[root]

    def _root(self, shard: Shard) -> Path | None:
        if self.config.folder is not None:
            return Path(self.config.folder)
        return None if shard.remote else Path(shard.url).parent


class OrderConfig(SourceConfig):
    """Keys of sources that have no order of text and picture of their own."""

    order: Literal["text_first", "text_last"] = "text_first"
    """Whether the text of a document stands before what it describes, or after it."""
    swapped: float = Field(0.0, ge=0, le=1)
    """Share of documents in which it is the other way round; a hash of the document's key decides which."""

    def text_first(self, key: str) -> bool:
        """Whether the text of a document stands first."""
        return (self.order == "text_first") != (share(key, "order") < self.swapped)

    def ordered(self, key: str, text: Content, other: Content) -> list[Content]:
        """A text and what it describes, in their order."""
        return [text, other] if self.text_first(key) else [other, text]
