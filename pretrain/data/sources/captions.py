"""Texts with a picture or a sound each, in records."""

from __future__ import annotations

from typing import Self

import pydantic

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.sources.media import Folder, NotThere
from pretrain.data.sources.recorded import OrderConfig, RecordsConfig, RecordSource
from pretrain.data.sources.records import Record
from pretrain.data.sources.source import Contents, text_part
from zoo.registry import register


@register("source", "captions")
class Captions(RecordSource):
    """Captions and their pictures, or transcripts and their recordings: a record each, with the name of a file below
    the folder, or the file itself as bytes."""

    class Config(RecordsConfig, OrderConfig):
        text: str = "caption"
        """Column of the text."""
        image: str | None = "image"
        """Column of the picture: the name of its file, its bytes, a `data:` URL, or Hugging Face's mapping."""
        audio: str | None = None
        """Column of the recording, in place of `image`."""
        name: str = "{}"
        """How a file is called for the name in the column: `clips/{}`, `wavs/{}.wav`."""

        @pydantic.model_validator(mode="after")
        def _describes_something(self) -> Self:
            if (self.image is None) == (self.audio is None):
                raise ValueError("names both image and audio, or neither; set the one that it does not have to null")
            return self

    config: Config

    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        kind, column = ("audio", self.config.audio) if self.config.audio else ("image", self.config.image or "")
        for wanted in (self.config.text, column):
            if wanted not in record:
                raise BrokenDocument(f"it has no column {wanted!r}; it has {shown(', '.join(record))}")
        value = record[column]
        if isinstance(value, str) and not value.startswith("data:"):
            value = self.config.name.replace("{}", value)
        try:
            described = folder.content(kind, value)
        except NotThere as error:
            raise BrokenDocument(f"its {error}") from None
        return Contents(self.config.ordered(key, text_part(record[self.config.text]), described))
