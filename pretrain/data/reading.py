"""One document: from the bytes of its members to parts, and from parts to tokens.

A document is `<key>.json` with `{"parts": [{"type": "text", "text": …}, {"type": "image", "file": "0.jpg"}, …]}` and
the files it names beside it. Its tokens are `<bos>`, the tokens of each part, `<eos>`; a part that is not text stands
between its begin and end token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pretrain.data.errors import DataError, shown
from pretrain.data.items import stored
from pretrain.data.shards import Entry
from pretrain.data.tar import UNREADABLE
from zoo.modalities import PARTS, Grammar, Modality, Vocabulary

CAPTIONED = ("txt", "jpg", "jpeg", "png", "webp")
"""What img2dataset calls a caption and a picture beside `KEY.json`."""


class BrokenDocument(Exception):
    """This document cannot be used; the message says why."""


Readers = Mapping[str, Callable[[bytes], Any]]
"""Type of a part → what makes its item from the bytes of its file, or of its text."""


class DocumentPart(NamedTuple):
    """One part of a document."""

    type: str
    """What the document calls it: text, image, audio, video, or a type of a user's own."""
    item: Any
    """What its reader has made of it; None where there is no reader for its type."""


def read_parts(shard: BinaryIO, entry: Entry, readers: Readers) -> Iterator[DocumentPart]:
    """The parts of a document, in order. Files of types without a reader are not looked at.

    Raises:
        BrokenDocument: invalid JSON, a part that is malformed, a missing file, a file that does not decode.
    """
    known = list(dict.fromkeys((*PARTS, *readers)))
    for number, part in enumerate(_parts(shard, entry)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in known:
            raise BrokenDocument(f"part {number} has type {shown(repr(kind))}; known: {', '.join(known)}")
        reader = readers.get(kind)
        if kind == "text":
            name, content = f"text part {number}", _text(part.get("text"), number)
        elif reader is not None:
            name, content = shown(str(part.get("file"))), _file(shard, entry, kind, part.get("file"))
        else:
            name, content = "", b""
        yield DocumentPart(kind, None if reader is None else _item(reader, name, content))


def _item(reader: Callable[[bytes], Any], name: str, content: bytes) -> Any:
    try:
        return reader(content)
    except MemoryError:  # passes, so it says nothing about the document
        raise DataError(f"{name}: the memory does not suffice to decode it; free some and start again") from None
    except Exception as error:  # decoders raise anything for bytes they cannot read: OSError, struct.error
        raise BrokenDocument(f"{name} does not decode ({type(error).__name__}: {error})") from None


class Tokens(NamedTuple):
    """A document, tokenised."""

    tokens: np.ndarray
    """(n,) int32; where a position carries no id, the one that holds its place."""
    spans: list[tuple[int, int, int]]
    """(start, stop, number of the modality) in the tokens of each part that must never be cut, markers included."""
    content: list[tuple[str, np.ndarray]]
    """(modality, (n, …)) of each part whose positions carry no ids: what they carry, as it is kept on disk."""


def tokenize(
    shard: BinaryIO, entry: Entry, modalities: Mapping[str, Modality], grammars: Mapping[str, Grammar]
) -> Tokens:
    """Tokens of a document.

    Args:
        shard: the open shard.
        grammars: of the modalities.
    Raises:
        BrokenDocument: see `read_parts`; also a part that no modality reads, an item of more positions than its
            modality allows, or one whose numbers are not finite.
    """
    document = Tokens(np.zeros(0), [], [])
    runs: list[np.ndarray] = [np.array([Vocabulary.bos])]
    length = 1
    names = {modality.config.part: name for name, modality in modalities.items()}
    for part in read_parts(shard, entry, {kind: modalities[name].config.read for kind, name in names.items()}):
        if part.type not in names:
            raise BrokenDocument(f"it has {part.type}, for which the recipe has no modality")
        name = names[part.type]
        grammar, content = grammars[name], np.asarray(modalities[name].encode(part.item))
        allowed, form = grammar.positions, stored(grammar.carries)
        if form is not None:
            document.content.append((name, _checked(content, form, part.type)))
        if allowed is not None and not allowed.least <= len(content) <= allowed.most:
            raise BrokenDocument(
                f"its {part.type} takes {len(content)} positions, modalities.{name} allows {allowed.least} to "
                f"{allowed.most}"
            )
        ids = grammar.tokens(content)
        if allowed is not None:
            document.spans.append((length, length + len(ids), grammar.choice.modality))
        runs.append(ids)
        length += len(ids)
    runs.append(np.array([Vocabulary.eos]))
    return document._replace(tokens=np.concatenate(runs).astype(np.int32))


def _checked(content: np.ndarray, form: tuple[np.dtype, tuple[int, ...]], kind: str) -> np.ndarray:
    """What the positions of an item carry, as it is kept.

    Raises:
        BrokenDocument: it holds a number that is not finite.
        ValueError: the modality's `encode` does not do what its config says.
    """
    dtype, shape = form
    if content.shape[1:] != shape:
        raise ValueError(f"{kind}: encode gave an array of shape {content.shape}; its positions carry {shape}")
    if not np.isfinite(content).all():
        raise BrokenDocument(f"its {kind} holds numbers that are not finite")
    return content.astype(dtype)


def _parts(shard: BinaryIO, entry: Entry) -> list:
    try:
        document = json.loads(read_member(shard, entry, "json"))
    except (ValueError, RecursionError) as error:
        raise BrokenDocument(f'its JSON is not {{"parts": […]}} ({type(error).__name__}: {error})') from None
    if not isinstance(document, dict) or "parts" not in document:
        hint = ""
        if any(member.extension.lower() in CAPTIONED for member in entry.members):
            hint = "; it looks like a picture and its caption as img2dataset writes them: list both as parts"
        raise BrokenDocument(f'its JSON is not {{"parts": […]}} (it has no "parts"{hint})')
    parts = document["parts"]
    if not isinstance(parts, list) or not parts:
        raise BrokenDocument('its "parts" is not a list with an entry')
    return parts


def _text(text: Any, number: int) -> bytes:
    if not isinstance(text, str):
        raise BrokenDocument(f'text part {number} has no string "text"')
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # JSON can spell lone surrogates, which are not text
        raise BrokenDocument(f"text part {number} is not valid Unicode ({error.reason})") from None


def _file(shard: BinaryIO, entry: Entry, kind: str, file: Any) -> bytes:
    if not isinstance(file, str):
        raise BrokenDocument(f'{kind} part names no "file"')
    return read_member(shard, entry, file)


def read_member(shard: BinaryIO, entry: Entry, extension: str) -> bytes:
    """The bytes of one file of a document.

    Raises:
        BrokenDocument: it has no such file, or the file does not lie in the shard.
    """
    member = entry.find(extension)
    if member is None:
        raise BrokenDocument(f"its file {shown(f'{entry.key}.{extension}')} is missing")
    if member.size == UNREADABLE:
        raise BrokenDocument(
            f"its file {shown(f'{entry.key}.{extension}')} is a link that leads nowhere, a device or a sparse file"
        )
    shard.seek(member.offset)
    return shard.read(member.size)
