"""Records in files: JSON lines, a JSON list, CSV, parquet, and the Arrow files of Hugging Face's `datasets` on disk.

A file is a sequence of records, mappings from column to value. Nothing of them is kept in memory but where they begin,
except of a JSON list, whose text is.
"""

from __future__ import annotations

import array
import contextlib
import csv
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from pretrain.data.errors import BrokenDocument, DataError
from zoo.extras import extra

Record = Mapping[str, Any]
ENDINGS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow")
"""Endings of files of records."""
PACKED = "{,.gz,.bz2,.xz}"
NAMES = f"*.{{{','.join(ending for ending in ENDINGS if ending != 'json')}}}{PACKED}"
"""Pattern of their names; what else is called .json in a folder is seldom a list of records."""
GROUPS = 2
"""Row groups of a parquet file that are kept decoded."""


class Records(Protocol):
    """The records of an open file, for any number of threads."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, number: int) -> Record:
        """Record `number`, counted from 0; raises `BrokenDocument` where it is none."""
        ...


@contextlib.contextmanager
def open_records(file: Path, name: str, delimiter: str | None = None, columns: Sequence[str] = ()) -> Iterator[Records]:
    """The records of a file, until the context ends.

    Args:
        file: on this machine, uncompressed.
        name: what the file is called where it comes from; its ending says what it holds.
        delimiter: stands between the values of a CSV file; default: a comma, in `.tsv` a tab.
        columns: of a CSV file whose first line does not name them.
    Raises:
        DataError: it is not what its ending says.
    """
    words = name.lower().split(".")
    kind = next((word for word in reversed(words) if word in ENDINGS), "")
    with contextlib.ExitStack() as stack:
        if kind == "json":
            yield _List(file, name)
        elif kind in ("jsonl", "ndjson"):
            yield _Lines(stack.enter_context(open(file, "rb")))
        elif kind in ("csv", "tsv"):
            delimiter = delimiter or ("\t" if kind == "tsv" else ",")
            yield _Table(stack.enter_context(open(file, "rb")), name, delimiter, columns)
        elif kind in ("parquet", "arrow"):
            yield stack.enter_context(_columns(file, name, kind))
        else:
            raise DataError(f"{name}: its ending is none of {', '.join(ENDINGS)}")


class _Pieces:
    """Stretches of an open file, a record each."""

    def __init__(self, content: BinaryIO, pieces: array.array) -> None:
        self._descriptor = content.fileno()
        self._pieces = np.frombuffer(pieces, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._pieces)

    def text(self, number: int) -> str:
        """The record as it is written."""
        start, stop = self._pieces[number].tolist()
        try:
            return os.pread(self._descriptor, stop - start, start).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenDocument(f"it is not UTF-8 ({error.reason} at byte {start + error.start})") from None


class _Lines(_Pieces):
    """A JSON object a line."""

    def __init__(self, content: BinaryIO) -> None:
        pieces, start = array.array("q"), 0
        for line in content:
            if line.strip():
                pieces.extend((start, start + len(line)))
            start += len(line)
        super().__init__(content, pieces)

    def read(self, number: int) -> Record:
        return _object(self.text(number))


class _Table(_Pieces):
    """CSV: values may be quoted and hold line ends."""

    def __init__(self, content: BinaryIO, name: str, delimiter: str, columns: Sequence[str]) -> None:
        csv.field_size_limit(sys.maxsize)  # as default it refuses values of more than 128 KiB
        pieces, self.delimiter = array.array("q"), delimiter
        place = 0

        def lines() -> Iterator[str]:
            nonlocal place
            for line in content:
                place += len(line)
                yield line.decode("utf-8", "replace")

        start = 0
        try:
            for row in csv.reader(lines(), delimiter=delimiter):
                if row:
                    pieces.extend((start, place))
                start = place
        except csv.Error as error:
            raise DataError(f"{name}: is not CSV near byte {place} ({error})") from None
        super().__init__(content, pieces)
        if not columns and len(self):
            columns, self._pieces = self._row(0), self._pieces[1:]
        self.columns = columns

    def _row(self, number: int) -> list[str]:
        return next(csv.reader(self.text(number).splitlines(keepends=True), delimiter=self.delimiter))

    def read(self, number: int) -> Record:
        values = self._row(number)
        if len(values) != len(self.columns):
            raise BrokenDocument(f"it has {len(values)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, values, strict=True))


class _List:
    """A JSON list of objects."""

    def __init__(self, file: Path, name: str) -> None:
        try:
            self._text = file.read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}: is not UTF-8 ({error.reason} at byte {error.start})") from None
        decoder, self._pieces = json.JSONDecoder(), array.array("q")
        place = self._blank(0)
        if not self._text.startswith("[", place):
            raise DataError(f"{name}: is not a JSON list; call a file with an object a line .jsonl")
        place = self._blank(place + 1)
        while not self._text.startswith("]", place):
            try:
                _, stop = decoder.raw_decode(self._text, place)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}: is not JSON at character {place} ({error})") from None
            self._pieces.extend((place, stop))
            place = self._blank(stop)
            if self._text.startswith(",", place):
                place = self._blank(place + 1)
            elif not self._text.startswith("]", place):
                raise DataError(f"{name}: is not JSON at character {place}: a comma or ] is missing")

    def _blank(self, place: int) -> int:
        """The first character from `place` on that is no white space."""
        while self._text[place : place + 1].isspace():
            place += 1
        return place

    def __len__(self) -> int:
        return len(self._pieces) // 2

    def read(self, number: int) -> Record:
        return _object(self._text[self._pieces[2 * number] : self._pieces[2 * number + 1]])


class _Arrow:
    """A table in Arrow's format, mapped into memory."""

    def __init__(self, table: Any) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, number: int) -> Record:
        return self._table.slice(number, 1).to_pylist()[0]


class _Parquet:
    """A parquet file, decoded row group by row group."""

    def __init__(self, file: Any) -> None:
        self._file, self._lock = file, threading.Lock()
        sizes = [file.metadata.row_group(n).num_rows for n in range(file.metadata.num_row_groups)]
        self._stops = np.cumsum(np.array(sizes, np.int64))
        self._groups: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def read(self, number: int) -> Record:
        group = int(np.searchsorted(self._stops, number, side="right"))
        with self._lock:
            table = self._groups.pop(group, None)
            if table is None:
                table = self._file.read_row_group(group)
            self._groups[group] = table  # the newest stand last
            while len(self._groups) > GROUPS:
                del self._groups[next(iter(self._groups))]
        first = int(self._stops[group - 1]) if group else 0
        return table.slice(number - first, 1).to_pylist()[0]


@contextlib.contextmanager
def _columns(file: Path, name: str, kind: str) -> Iterator[Records]:
    with extra("sources", f"{name}: reading .{kind}"):
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    with contextlib.ExitStack() as stack:
        try:
            if kind == "parquet":
                records: Records = _Parquet(stack.enter_context(pyarrow.parquet.ParquetFile(file)))
            else:
                mapped = stack.enter_context(pyarrow.memory_map(str(file)))
                records = _Arrow(stack.enter_context(pyarrow.ipc.open_stream(mapped)).read_all())
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{name}: is not a whole .{kind} file ({error}); copy or write it again") from None
        yield records


def _object(text: str) -> Record:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(f"it is not JSON ({type(error).__name__}: {error})") from None
    if not isinstance(record, dict):
        raise BrokenDocument(f"it is {type(record).__name__}, not a JSON object")
    return record
