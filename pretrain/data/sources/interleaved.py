"""Texts and pictures in the order of a page: one list each, as in OBELICS."""

from __future__ import annotations

from typing import Any

from pretrain.data.errors import BrokenDocument
from pretrain.data.sources.media import Folder, NotThere, check_picture
from pretrain.data.sources.recorded import RecordsConfig, RecordSource
from pretrain.data.sources.records import Record
from pretrain.data.sources.source import Content, Contents, Loss, text_part
from zoo.registry import register


@register("source", "interleaved")
class Interleaved(RecordSource):
    """Pages as OBELICS has them: two lists of equal length, `texts` and `images`, in each place of which one has
    something and the other null. A picture that cannot be had is left out of its page and counted."""

    class Config(RecordsConfig):
        texts: str = "texts"
        """Column of the list of texts."""
        images: str = "images"
        """Column of the list of pictures: names of files below the folder, bytes, `data:` URLs, or Hugging Face's
        mappings."""

    config: Config

    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        texts, images = (listed(record, column) for column in (self.config.texts, self.config.images))
        if len(texts) != len(images):
            raise BrokenDocument(f"it has {len(texts)} texts and {len(images)} images; the lists stand side by side")
        parts: list[Content] = []
        losses: list[Loss] = []
        for number, (text, image) in enumerate(zip(texts, images, strict=True)):
            if image is not None:
                add_picture(folder, image, parts, losses)
            if text is not None:
                parts.append(text_part(text, number))
        return checked(parts, losses)


def listed(record: Record, column: str) -> list[Any]:
    """A column that is a list; raises `BrokenDocument`."""
    if not isinstance(record.get(column), list):
        raise BrokenDocument(f"it has no list {column!r}")
    return record[column]


def add_picture(folder: Folder, value: Any, parts: list[Content], losses: list[Loss], below: str = "") -> None:
    """Add the picture that a value stands for to `parts`, or to `losses` why it cannot be had."""
    try:
        parts.append(check_picture(folder.content("image", value, below)))
    except NotThere as error:
        losses.append(Loss(error.kind, error.example))


def checked(parts: list[Content], losses: list[Loss]) -> Contents:
    """What a page holds; raises `BrokenDocument` where nothing is left."""
    if not parts:
        why = f": {losses[0].kind}: {losses[0].example}" if losses else ""
        raise BrokenDocument(f"nothing of it can be used{why}")
    return Contents(parts, losses)
