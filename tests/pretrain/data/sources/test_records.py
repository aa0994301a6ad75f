"""Files of records: whatever the format, the same records, one by one and in any order."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.sources.records import open_records

ROWS = [{"n": str(n), "text": text} for n, text in enumerate(["a", 'b, "c"\nd', "ü" * 200_000, "", "[]{}"])]


def jsonl(path: Path) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n \n".join(lines).encode())


def json_list(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False) + "\n")


def table(path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["n", "text"], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)


def parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)


def arrow(path: Path) -> None:
    folder = path.with_suffix("")
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    file.rename(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("x.jsonl", jsonl),
        ("x.json", json_list),
        ("x.csv", table),
        ("x.tsv", table),
        ("x.parquet", parquet),
        ("x.arrow", arrow),
    ],
)
def test_every_format_holds_the_same(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    numbers = list(range(len(ROWS)))
    random.Random(0).shuffle(numbers)
    with open_records(tmp_path / name, name) as records:
        assert len(records) == len(ROWS)
        assert {n: records.read(n) for n in numbers} == dict(enumerate(ROWS))


def test_a_table_without_names(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text("LJ-1|Printing,|printing\nLJ-2|in|in\n")
    with open_records(tmp_path / "metadata.csv", "metadata.csv", "|", ["id", "text", "spoken"]) as records:
        assert [records.read(n)["id"] for n in range(len(records))] == ["LJ-1", "LJ-2"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', r"it is not JSON \(JSONDecodeError"),
        ("x.jsonl", b'{"a": 1}\n[1]\n', "it is list, not a JSON object"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"it is not UTF-8 \(invalid start byte at byte 16\)"),
        ("x.jsonl", b'{"a": 1}\n' + b"[" * 100_000, r"it is not JSON \(RecursionError"),
        ("x.csv", b"a,b\n1,2\n1,2,3\n", "it has 3 values for 2 columns"),
        ("x.json", b'[{"a": 1}, 7]', "it is int, not a JSON object"),
    ],
)
def test_a_broken_record_is_named_and_the_others_are_read(
    name: str, content: bytes, reason: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with open_records(tmp_path / name, name) as records:
        assert len(records) == 2 and records.read(0)
        with pytest.raises(BrokenDocument, match=reason):
            records.read(1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", b'{"a": 1}', "is not a JSON list; call a file with an object a line .jsonl"),
        ("x.json", b'[{"a": 1}', r"is not JSON at character 9: a comma or \] is missing"),
        ("x.json", b'[{"a" 1}]', "is not JSON at character 1"),
        ("x.json", b"\xff", "is not UTF-8"),
        ("x.parquet", b"PAR1", "is not a whole .parquet file .*; copy or write it again"),
        ("x.arrow", b"", "is not a whole .arrow file"),
        ("x.xml", b"", "its ending is none of jsonl, "),
    ],
)
def test_a_file_that_is_not_what_it_says(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"^{name}: {reason}"), open_records(tmp_path / name, name):
        pass


def test_a_truncated_parquet_file_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet")
    whole = (tmp_path / "x.parquet").read_bytes()
    for size in (3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "x.parquet").write_bytes(whole[:size])
        with (
            pytest.raises(DataError, match="is not a whole .parquet file"),
            open_records(tmp_path / "x.parquet", "x.parquet"),
        ):
            pass
