"""Write documents of ours in every format that people have, read them back, and compare.

    python -m tools.examples.formats FOLDER [OUT]

FOLDER holds shards of ours, also in folders below it. Each of their documents is written in all formats that can hold
what it holds, read by the source of that format (docs/data.md), and compared part by part, byte for byte. What makes
tokens of a document sees its parts alone, so equal parts are equal tokens under every tokenizer. The files stay in OUT,
to be looked at; without it they are removed.

Every writer is a few lines, and shows what a format looks like.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import html
import importlib.util
import itertools
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import webdataset
from rich.console import Console
from rich.table import Table

from tools.make_shards.writing import ending
from zoo.config import UserError
from zoo.registry import parse_block

RECORDS = 500
"""Records of a row group of parquet, and documents of a tar shard."""


class Part(NamedTuple):
    """A part of a document, with its bytes."""

    type: str
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()


class Read(NamedTuple):
    """A format as it was written: what reads it, and the documents that it could hold."""

    keys: Mapping[str, Any]
    """What a recipe says of the source, beside its path."""
    documents: Sequence[list[Part]]


@dataclasses.dataclass(frozen=True)
class Format:
    """A way to write documents of one shape."""

    name: str
    shape: str
    """`pair`, `page`, `text` or `sound`; see `shape_of`."""
    write: Callable[[Path, Sequence[list[Part]]], Read]
    needs: str = ""
    """A package that it needs."""


FORMATS: list[Format] = []


def format_of(name: str, shape: str, needs: str = "") -> Callable[[Callable], Callable]:
    """Decorator: the function writes documents of a shape into a new folder."""

    def add(write: Callable[[Path, Sequence[list[Part]]], Read]) -> Callable:
        FORMATS.append(Format(name, shape, write, needs))
        return write

    return add


def shape_of(parts: Sequence[Part]) -> str:
    """Which formats can hold a document: a `pair` of a text and a picture, a `sound` and its text, a `text` alone, a
    `page` of texts and pictures; empty for any other."""
    kinds = [part.type for part in parts]
    shapes = {"image text": "pair", "audio text": "sound", "text": "text"}
    return shapes.get(" ".join(sorted(kinds)), "page" if set(kinds) == {"text", "image"} else "")


def _order(documents: Sequence[list[Part]]) -> str:
    """Where the text stands in documents of two parts, as the key `order` says it."""
    return "text_first" if documents[0][0].type == "text" else "text_last"


def _lines(path: Path, records: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _parquet(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path, row_group_size=RECORDS)


def _file(folder: Path, number: int, part: Part, place: int = 0) -> str:
    """Write a picture or a recording; returns its name."""
    name = f"{number:07}.{place}.{ending(part.content, '')}"
    (folder / name).write_bytes(part.content)
    return name


# -------------------------------------------------------------------------------------------- a text and a picture


def _captioned(folder: Path, documents: Sequence[list[Part]]) -> list[dict[str, str]]:
    """A record of each pair, and its picture as a file."""
    pairs = [{part.type: part for part in parts} for parts in documents]
    return [{"caption": pair["text"].text, "image": _file(folder, n, pair["image"])} for n, pair in enumerate(pairs)]


@format_of("captions, JSONL and files", "pair")
def captions_jsonl(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _lines(folder / "captions.jsonl", _captioned(folder, documents))
    return Read({"type": "captions", "order": _order(documents)}, documents)


@format_of("captions, CSV and files", "pair")
def captions_csv(folder: Path, documents: Sequence[list[Part]]) -> Read:
    with open(folder / "captions.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ["image", "caption"])
        table.writeheader()
        table.writerows(_captioned(folder, documents))
    return Read({"type": "captions", "order": _order(documents)}, documents)


def _with_bytes(documents: Sequence[list[Part]]) -> list[dict[str, Any]]:
    pairs = [{part.type: part for part in parts} for parts in documents]
    return [{"caption": pair["text"].text, "image": pair["image"].content} for pair in pairs]


@format_of("captions, parquet with bytes", "pair", needs="pyarrow")
def captions_parquet(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _parquet(folder / "captions.parquet", _with_bytes(documents))
    return Read({"type": "captions", "order": _order(documents)}, documents)


@format_of("captions, Hugging Face datasets on disk", "pair", needs="datasets")
def captions_datasets(folder: Path, documents: Sequence[list[Part]]) -> Read:
    import datasets

    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    records = [record | {"image": {"bytes": record["image"], "path": None}} for record in _with_bytes(documents)]
    datasets.Dataset.from_list(records, features=features).save_to_disk(folder)
    return Read({"type": "captions", "order": _order(documents)}, documents)


def _img2dataset(*beside: str) -> None:
    @format_of(f"img2dataset, {' and '.join(beside)}", "pair")
    def write(folder: Path, documents: Sequence[list[Part]]) -> Read:
        with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=RECORDS, verbose=0) as shards:
            for number, record in enumerate(_with_bytes(documents)):
                described = {"txt": record["caption"], "json": {"caption": record["caption"], "status": "success"}}
                files = {name: described[name] for name in beside} | {ending(record["image"], ""): record["image"]}
                shards.write({"__key__": f"{number:09}", **files})
        return Read({"type": "img2dataset", "order": _order(documents)}, documents)


_img2dataset("txt")
_img2dataset("json")
_img2dataset("txt", "json")


@format_of("LLaVA, JSON", "pair")
def llava(folder: Path, documents: Sequence[list[Part]]) -> Read:
    records = []
    for record in _captioned(folder, documents):
        said = ["<image>", record["caption"]] if _order(documents) == "text_last" else [record["caption"], "<image>"]
        turns = [{"from": who, "value": what} for who, what in zip(("human", "gpt"), said, strict=True)]
        records.append({"image": record["image"], "conversations": turns})
    (folder / "conversations.json").write_text(json.dumps(records))
    return Read({"type": "llava", "human": "", "assistant": "", "end": ""}, documents)


# --------------------------------------------------------------------------------------------- texts and pictures


def _columns(folder: Path | None, documents: Sequence[list[Part]]) -> Iterator[dict[str, list]]:
    """Texts and pictures of each page as two lists; pictures as files of a folder, or as bytes without one."""
    for number, parts in enumerate(documents):
        texts = [part.text if part.type == "text" else None for part in parts]
        pictures = [
            None if part.type == "text" else part.content if folder is None else _file(folder, number, part, place)
            for place, part in enumerate(parts)
        ]
        yield {"texts": texts, "images": pictures}


@format_of("interleaved (OBELICS), JSONL and files", "page")
def obelics_jsonl(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _lines(folder / "pages.jsonl", list(_columns(folder, documents)))
    return Read({"type": "interleaved"}, documents)


@format_of("interleaved (OBELICS), parquet with bytes", "page", needs="pyarrow")
def obelics_parquet(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _parquet(folder / "pages.parquet", list(_columns(None, documents)))
    return Read({"type": "interleaved"}, documents)


@format_of("MMC4, JSONL and files", "page")
def mmc4(folder: Path, documents: Sequence[list[Part]]) -> Read:
    """Each picture belongs to the text after it. A page that ends in a picture, or has two texts in a row, which MMC4
    would join, cannot be told so."""
    fitting = [
        parts
        for parts in documents
        if parts[-1].type == "text" and all({a.type, b.type} != {"text"} for a, b in itertools.pairwise(parts))
    ]
    records = []
    for number, parts in enumerate(fitting):
        texts, pictures = [part.text for part in parts if part.type == "text"], []
        for place, part in enumerate(parts):
            if part.type == "image":
                before = sum(other.type == "text" for other in parts[:place])
                pictures.append(
                    {"image_name": _file(folder, number, part, place), "matched_text_index": before},
                )
        records.append({"text_list": texts, "image_info": pictures})
    _lines(folder / "pages.jsonl", records)
    return Read({"type": "mmc4", "order": "text_last"}, fitting)


def _pages(name: str, suffix: str, text: Callable[[str], str], picture: str, needs: str = "") -> None:
    @format_of(f"pages, {name}", "page", needs)
    def write(folder: Path, documents: Sequence[list[Part]]) -> Read:
        for number, parts in enumerate(documents):
            told = [
                text(part.text) if part.type == "text" else picture.format(_file(folder, number, part, place))
                for place, part in enumerate(parts)
            ]
            (folder / f"{number:07}.{suffix}").write_text("\n\n".join(told) + "\n")
        return Read({"type": "pages"}, documents)


def _fenced(text: str) -> str:
    """A block of code in Markdown, whose fence is longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def _paragraphs(text: str) -> str:
    lines = [html.escape(part).replace("\n", "<br>") for part in text.split("\n\n")]
    return "\n".join(f"<p>{line}</p>" for line in lines)


_pages("Markdown, code blocks", "md", _fenced, "![]({})")
_pages("HTML, <pre>", "html", lambda text: f"<pre>\n{html.escape(text)}</pre>", '<img src="{}">')
_pages("HTML, paragraphs", "html", _paragraphs, '<img src="{}">')
_pages(
    "reStructuredText, literal blocks",
    "rst",
    lambda text: "::\n\n" + "\n".join("    " + line if line.strip() else line for line in text.split("\n")),
    ".. image:: {}",
    needs="docutils",
)


# ------------------------------------------------------------------------------------------------- texts, sounds


@format_of("text, a file each", "text")
def text_files(folder: Path, documents: Sequence[list[Part]]) -> Read:
    for number, (part,) in enumerate(documents):
        (folder / f"{number:07}.txt").write_bytes(part.content)
    return Read({"type": "text"}, documents)


@format_of("text, one file with separators", "text")
def text_separated(folder: Path, documents: Sequence[list[Part]]) -> Read:
    (folder / "texts.txt").write_bytes(b"<|endoftext|>".join(part.content for (part,) in documents))
    return Read({"type": "text", "separator": "<|endoftext|>"}, documents)


@format_of("text, JSONL", "text")
def text_jsonl(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _lines(folder / "texts.jsonl", [{"text": part.text} for (part,) in documents])
    return Read({"type": "text"}, documents)


@format_of("text, parquet", "text", needs="pyarrow")
def text_parquet(folder: Path, documents: Sequence[list[Part]]) -> Read:
    _parquet(folder / "texts.parquet", [{"text": part.text} for (part,) in documents])
    return Read({"type": "text"}, documents)


def _spoken(folder: Path, documents: Sequence[list[Part]]) -> list[tuple[str, str]]:
    """The file of each recording, and what is said in it."""
    pairs = [{part.type: part for part in parts} for parts in documents]
    return [(_file(folder, number, pair["audio"]), pair["text"].text) for number, pair in enumerate(pairs)]


@format_of("recordings with NAME.txt", "sound")
def audio_folder(folder: Path, documents: Sequence[list[Part]]) -> Read:
    for name, said in _spoken(folder, documents):
        (folder / name).with_suffix(".txt").write_text(said)
    return Read({"type": "audio_folder", "order": _order(documents)}, documents)


@format_of("recordings with *.trans.txt", "sound")
def librispeech(folder: Path, documents: Sequence[list[Part]]) -> Read:
    lines = [f"{Path(name).stem} {said}\n" for name, said in _spoken(folder, documents)]
    (folder / "all.trans.txt").write_text("".join(lines))
    return Read({"type": "audio_folder", "order": _order(documents)}, documents)


@format_of("recordings in a table", "sound")
def common_voice(folder: Path, documents: Sequence[list[Part]]) -> Read:
    lines = [f"{name}\t{said}\n" for name, said in _spoken(folder, documents)]
    (folder / "clips.tsv").write_text("path\tsentence\n" + "".join(lines))
    keys = {"type": "captions", "files": "*.tsv", "image": None, "audio": "path", "text": "sentence"}
    return Read({**keys, "order": _order(documents)}, documents)


# -------------------------------------------------------------------------------------------------- there and back


class Result(NamedTuple):
    """What became of some documents in a format."""

    format: str
    documents: int
    """How many were written."""
    equal: int
    other: int
    """Read, and not those that were written in that place."""
    size: int
    """Bytes of the parts written."""


def read(path: Path, **keys: Any) -> Iterator[list[Part]]:
    """The documents of a source, with their bytes.

    Raises:
        UserError: it cannot be read.
    """
    source = (config := parse_block("source", {"path": str(path), **keys}, "source")).block(config)
    with tempfile.TemporaryDirectory() as cache:
        for shard in source.shards():
            with source.open(shard, Path(cache)) as documents:
                for document in documents:
                    yield [Part(part.type, part.read()) for part in document.contents().parts]


def there_and_back(found: Format, documents: Sequence[list[Part]], folder: Path) -> Result:
    """Write documents, read them, compare."""
    folder.mkdir(parents=True)
    written = found.write(folder, documents)
    equal = other = 0
    for wanted, got in itertools.zip_longest(written.documents, read(folder, **written.keys)):
        equal += wanted == got
        other += wanted != got and got is not None
    size = sum(len(part.content) for parts in written.documents for part in parts)
    return Result(found.name, len(written.documents), equal, other, size)


def compare(folder: Path, out: Path) -> Iterator[Result]:
    """The results of all formats that can be written here, for the documents below a folder.

    Raises:
        UserError: there are none.
    """
    groups: dict[tuple[str, str], list[list[Part]]] = {}
    for parts in read(folder, type="documents", files="**/*.tar"):
        shape = shape_of(parts)
        groups.setdefault((shape, _order([parts]) if shape in ("pair", "sound") else ""), []).append(parts)
    for (shape, order), documents in sorted(groups.items()):
        for number, found in enumerate(FORMATS):
            if found.shape == shape and (not found.needs or importlib.util.find_spec(found.needs)):
                yield there_and_back(found, documents, out / f"{shape}-{order}-{number:02}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.examples.formats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="new folder for the files")
    options = parser.parse_args(arguments)
    table = Table("format", "documents", "equal", "other", "MB")
    held = None if options.out else tempfile.TemporaryDirectory()
    try:
        if options.out and options.out.exists():
            raise UserError(f"{options.out}: is there already; give another folder, or remove it")
        for result in compare(options.folder, options.out or Path(held.name if held else "")):
            print(f"{result.format}: {result.equal:,} of {result.documents:,} equal", file=sys.stderr, flush=True)
            numbers = (f"{result.documents:,}", f"{result.equal:,}", f"{result.other:,}", f"{result.size / 1e6:.1f}")
            table.add_row(result.format, *numbers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
