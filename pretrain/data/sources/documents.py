"""Our own documents: WebDataset tar shards in which `KEY.json` lists the parts of a document.

`{"parts": [{"type": "text", "text": …}, {"type": "image", "file": "0.jpg"}, …]}`; the file of a part is `KEY.0.jpg`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.shards import Entry, checksum, scan_shard
from pretrain.data.sources.files import Shard
from pretrain.data.sources.members import Members
from pretrain.data.sources.source import Content, Contents, Document, Source, SourceConfig, text_part
from zoo.registry import register

CAPTIONED = ("txt", "jpg", "jpeg", "png", "webp")
"""What img2dataset calls a caption and a picture beside `KEY.json`."""


@register("source", "documents")
class DocumentShards(Source):
    """Our own documents, in WebDataset tar shards: `KEY.json` with `{"parts": […]}` and the files that it names."""

    class Config(SourceConfig):
        files: str = "*.tar{,.gz}"

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        file = shard.local(cache)
        entries = scan_shard(file, shown(shard.url))
        with Members.opened(file) as members:
            yield [Document(entry.key, functools.partial(_contents, members, entry)) for entry in entries]

    def identity(self, shard: Shard, cache: Path) -> str:
        """The sha256 of the tar file."""
        return checksum(shard.local(cache))


@contextlib.contextmanager
def open_shards(files: Sequence[Path]) -> Iterator[dict[Path, Sequence[Document]]]:
    """The documents of each of some tar files on this machine.

    Raises:
        DataError: one of them is damaged.
    """
    source = DocumentShards(DocumentShards.Config(path=[str(file) for file in files]))
    with contextlib.ExitStack() as stack:
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield {file: stack.enter_context(source.open(Shard(str(file)), cache)) for file in files}


def _contents(members: Members, entry: Entry) -> Contents:
    return Contents([_part(members, entry, number, part) for number, part in enumerate(_parts(members, entry))])


def _parts(members: Members, entry: Entry) -> list:
    try:
        document = json.loads(members.read(entry, "json"))
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(f'its JSON is not {{"parts": […]}} ({type(error).__name__}: {error})') from None
    if not isinstance(document, dict) or "parts" not in document:
        hint = ""
        if any(member.extension.lower() in CAPTIONED for member in entry.members):
            hint = "; it looks like a picture and its caption as img2dataset writes them: read it by type: img2dataset"
        raise BrokenDocument(f'its JSON is not {{"parts": […]}} (it has no "parts"{hint})')
    parts = document["parts"]
    if not isinstance(parts, list) or not parts:
        raise BrokenDocument('its "parts" is not a list with an entry')
    return parts


def _part(members: Members, entry: Entry, number: int, part: Any) -> Content:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise BrokenDocument(f"part {number} has type {shown(repr(kind))}, which is no text")
    if kind == "text":
        return text_part(part.get("text"), number)
    file = part.get("file")
    return Content(kind, shown(str(file)), functools.partial(_file, members, entry, kind, file))


def _file(members: Members, entry: Entry, kind: str, file: Any) -> bytes:
    if not isinstance(file, str):
        raise BrokenDocument(f'{shown(kind)} part names no "file"')
    return members.read(entry, file)
