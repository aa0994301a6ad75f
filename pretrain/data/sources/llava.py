"""Conversations about pictures, as LLaVA and its successors have them."""

from __future__ import annotations

import re

from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.sources.media import Folder, NotThere
from pretrain.data.sources.recorded import RecordsConfig, RecordSource
from pretrain.data.sources.records import NAMES, PACKED, Record
from pretrain.data.sources.source import Content, Contents, text_part
from zoo.registry import register

PLACE = re.compile(r"\n?<image>\n?")
"""Where a picture stands in what is said; the line ends beside it are of the prompt."""


@register("source", "llava")
class Llava(RecordSource):
    """Conversations: `conversations`, a list of `{"from": "human", "value": "<image>\\nWhat is this?"}` and
    `{"from": "gpt", "value": …}`, and `image`, a name or a list of names. Each `<image>` is the next picture."""

    class Config(RecordsConfig):
        files: str = f"{{{NAMES},*.json{PACKED}}}"
        human: str = "USER: "
        """Stands before what the human says."""
        assistant: str = "ASSISTANT: "
        """Stands before what the model says."""
        end: str = "\n"
        """Stands after everything that is said."""

    config: Config

    def contents(self, key: str, record: Record, folder: Folder) -> Contents:
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise BrokenDocument('it has no list "conversations"')
        named = record.get("image", record.get("images"))
        names = [] if named is None else named if isinstance(named, list) else [named]
        pieces = PLACE.split("".join(self._said(number, turn) for number, turn in enumerate(turns)))
        if len(pieces) - 1 != len(names):
            raise BrokenDocument(f"it has {len(names)} images for {len(pieces) - 1} places <image>")
        parts: list[Content] = []
        for number, piece in enumerate(pieces):
            if number:
                try:
                    parts.append(folder.content("image", names[number - 1]))
                except NotThere as error:
                    raise BrokenDocument(f"its {error}") from None
            if piece:
                parts.append(text_part(piece, number))
        return Contents(parts)

    def _said(self, number: int, turn: object) -> str:
        speaker = turn.get("from") if isinstance(turn, dict) else None
        before = {"human": self.config.human, "gpt": self.config.assistant, "system": ""}
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or speaker not in before:
            raise BrokenDocument(
                f"conversations[{number}] is {shown(repr(turn))}; it needs from: human or gpt, and value"
            )
        return before[speaker] + turn["value"] + self.config.end
