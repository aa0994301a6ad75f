"""Pairs of picture and caption as img2dataset and WebDataset write them: `KEY.jpg` with `KEY.txt` or `KEY.json`."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.shards import Entry, scan_shard
from pretrain.data.sources.files import Shard
from pretrain.data.sources.members import Members
from pretrain.data.sources.recorded import OrderConfig
from pretrain.data.sources.source import Content, Contents, Document, Loss, Source, text_part
from zoo.registry import register

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif", "jp2", "img")
"""Endings of a picture's name; what it is, its bytes say."""


@register("source", "img2dataset")
class Img2dataset(Source):
    """Tar shards of pairs: `KEY.jpg` (or png, webp, …) with `KEY.txt`, `KEY.json`, or both. The caption is the text,
    else the JSON's `caption`."""

    class Config(OrderConfig):
        files: str = "*.tar{,.gz}"
        caption: str | None = None
        """Key of the JSON that holds the caption, in place of the text."""

    config: Config

    @contextlib.contextmanager
    def open(self, shard: Shard, cache: Path) -> Iterator[Sequence[Document]]:
        file = shard.local(cache)
        entries = scan_shard(file, shown(shard.url), (".txt", ".json"))
        with Members.opened(file) as members:
            yield [Document(entry.key, functools.partial(self._contents, members, entry)) for entry in entries]

    def _contents(self, members: Members, entry: Entry) -> Contents:
        pictures = [member.extension for member in entry.members if member.extension.lower() in PICTURES]
        if not pictures:
            raise BrokenDocument(f"it has no picture ({', '.join(PICTURES)})")
        text = text_part(self._caption(members, entry))
        image = Content("image", shown(pictures[0]), functools.partial(members.read, entry, pictures[0]))
        losses = [Loss("a second picture of a pair", f"{entry.key}.{extension}") for extension in pictures[1:]]
        return Contents(self.config.ordered(entry.key, text, image), losses)

    def _caption(self, members: Members, entry: Entry) -> object:
        try:
            if entry.find("txt") and self.config.caption is None:
                return members.read(entry, "txt").decode()
            if not entry.find("json"):
                raise BrokenDocument("it has no caption (no .json)" if self.config.caption else "it has no caption")
            record = json.loads(members.read(entry, "json"))
        except (ValueError, RecursionError) as error:
            raise BrokenDocument(f"its caption cannot be read ({type(error).__name__}: {error})") from None
        wanted = self.config.caption or "caption"
        caption = record.get(wanted) if isinstance(record, dict) else None
        if not isinstance(caption, str):
            raise BrokenDocument(f"its JSON has no text {wanted!r}")
        return caption
