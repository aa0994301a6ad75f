"""What a source makes of files, in a form that tests compare."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.errors import BrokenDocument
from pretrain.data.sources import Document, Source
from zoo.registry import parse_block

Told = list[tuple[str, bytes]] | str
"""Type and bytes of each part, or why the document is broken."""


def source(type: str, path: Path | str, **keys: object) -> Source:
    """A source, from what a recipe says of it."""
    config = parse_block("source", {"type": type, "path": str(path), **keys}, "data.source")
    return config.block(config)


def told(document: Document) -> Told:
    """What a document holds."""
    try:
        return [(part.type, part.read()) for part in document.contents().parts]
    except BrokenDocument as broken:
        return str(broken)


def everything(source: Source, cache: Path) -> dict[str, Told]:
    """What every document of a source holds, by its key."""
    found: dict[str, Told] = {}
    for shard in source.shards():
        with source.open(shard, cache) as documents:
            assert len({document.key for document in documents}) == len(documents)
            found.update((document.key, told(document)) for document in documents)
    return found
