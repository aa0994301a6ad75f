"""Texts: files of a folder, stretches of a large file, or a column of records."""

from __future__ import annotations

import array
import contextlib
import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pydantic import Field

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.sources.files import Shard, find_files, is_remote
from pretrain.data.sources.folders import GROUP
from pretrain.data.sources.media import Folder
from pretrain.data.sources.recorded import RecordsConfig, RecordSource
from pretrain.data.sources.records import ENDINGS, NAMES, PACKED, Record
from pretrain.data.sources.source import Contents, Document, Numbered, text_part
from zoo.registry import register


@register("source", "text")
class PlainText(RecordSource):
    """Texts. In files of records (`.jsonl`, `.csv`, `.parquet`, …) each record is a document; any other file is one, or
    several with a `separator` between them."""

    class Config(RecordsConfig):
        files: str = f"**/{{{NAMES},*.txt{PACKED}}}"
        text: str = "text"
        """Column of the text."""
        separator: str | None = Field(None, min_length=1)
        """What stands between the documents of a text file, such as `<|endoftext|>`; null: a file is a document."""

    config: Config

    def shards(self) -> list[Shard]:
        """A file of records, or one with separators, is a shard; other files of a folder are, up to 1,024 together."""
        together: dict[str, list[str]] = {}
        shards = []
        for file in find_files(self.config.path, self.config.files):
            if _has_records(file) or self.config.separator is not None or is_remote(file):
                shards.append(Shard(file))
            else:
                together.setdefault(str(Path(file).parent), []).append(Path(file).name)
        for folder, names in together.items():
            shards += [Shard(folder, tuple(names[n : n + GROUP])) for n in range(0, len(names), GROUP)]
        return sorted(shards, key=lambda shard: (shard.url, shard.files))

    def stamp(self, shard: Shard) -> str:
        return shard.stamp

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        if shard.files:
            where = Path(shard.url)
            yield Numbered(
                len(shard.files),
                lambda n: Document(f"{where.name}/{shard.files[n]}", _whole((where / shard.files[n]).read_bytes)),
            )
        elif _has_records(shard.name):
            with super().open(shard, cache) as documents:
                yield documents
        else:
            with _separated(shard.local(cache), self.config.separator) as pieces:
                yield Numbered(len(pieces), lambda n: Document(f"{shard.name}-{n:08}", _whole(lambda: pieces[n])))

    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        if self.config.text not in record:
            raise BrokenDocument(f"it has no column {self.config.text!r}; it has {shown(', '.join(record))}")
        return Contents([text_part(record[self.config.text])])


def _has_records(file: str) -> bool:
    return any(word in ENDINGS for word in Path(file).name.lower().split(".")[1:])


def _whole(read: Callable[[], bytes]) -> Callable[[], Contents]:
    """The bytes that `read` gives as a document of one text."""

    def contents() -> Contents:
        try:
            text = read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenDocument(f"it is not UTF-8 ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise BrokenDocument(f"it cannot be read ({error.strerror})") from None
        if not text:
            raise BrokenDocument("it is empty")
        return Contents([text_part(text)])

    return contents


class _Stretches(Sequence[bytes]):
    """Stretches of a mapped file."""

    def __init__(self, content: mmap.mmap | bytes, edges: array.array) -> None:
        self._content, self._edges = content, edges

    def __len__(self) -> int:
        return len(self._edges) // 2

    def __getitem__(self, number: int) -> bytes:  # pyrefly: ignore[bad-override]  # slices are asked of Numbered
        return self._content[self._edges[2 * number] : self._edges[2 * number + 1]]


@contextlib.contextmanager
def _separated(file: Path, separator: str | None) -> Iterator[_Stretches]:
    """The stretches of a file between separators that hold something; without one the whole file."""
    with contextlib.ExitStack() as stack:
        size = file.stat().st_size
        content: mmap.mmap | bytes = b""
        if size:  # an empty file cannot be mapped
            mapped = mmap.mmap(stack.enter_context(open(file, "rb")).fileno(), 0, access=mmap.ACCESS_READ)
            content = stack.enter_context(mapped)
        edges, start = array.array("q"), 0
        mark = None if separator is None else separator.encode()
        while start <= size:
            stop = -1 if mark is None else content.find(mark, start)
            stop = size if stop < 0 else stop
            if stop > start:
                edges.extend((start, stop))
            start = stop + (len(mark) if mark else 1)
        yield _Stretches(content, edges)
