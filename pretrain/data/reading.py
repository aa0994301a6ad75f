"""One document: from the bytes of its members to parts, and from parts to tokens.

A document is `<key>.json` with `{"parts": [{"type": "text", "text": …}, {"type": "image", "file": "0.jpg"},
…]}` and the files it names beside it. Its tokens are `<bos>`, the tokens of each part, `<eos>`; a part that
is not text stands between its begin and end token.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pretrain.data.shards import Entry
from zoo.modalities import Vocabulary

MODALITY_OF_PART = {"text": "text", "image": "image", "audio": "speech"}


class BrokenDocument(Exception):
    """This document cannot be used; the message says why."""


def decode_image(content: bytes) -> Image.Image:
    """A fully decoded picture; raises what Pillow raises."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


DECODERS: dict[str, Callable[[bytes], Any]] = {"image": decode_image}
"""modality → its files' bytes to what its tokenizer encodes."""


def read_parts(shard: BinaryIO, entry: Entry, wanted: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(modality, content) of each part of a document: content is the text, or what the modality's decoder
    returns.

    Files of modalities outside `wanted` are not looked at; their content is None.

    Raises:
        BrokenDocument: invalid JSON, a part that is malformed, a missing file, a file that does not decode.
    """
    for number, part in enumerate(_parts(shard, entry)):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in MODALITY_OF_PART:
            raise BrokenDocument(f"part {number} has type {kind!r}; known: {', '.join(MODALITY_OF_PART)}")
        modality = MODALITY_OF_PART[kind]
        if modality == "text":
            yield modality, _text(part.get("text"), number)
        elif modality not in wanted:
            yield modality, None
        else:
            yield modality, _decode(shard, entry, modality, part.get("file"))


def tokenize(
    shard: BinaryIO, entry: Entry, tokenizers: Mapping[str, Any], vocabulary: Vocabulary
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Tokens of a document.

    Args:
        shard: the open shard.
        tokenizers: modality → tokenizer.
    Returns:
        tokens (n,) int32, and the spans [start, stop) in them that must never be cut: parts that are not
        text.
    Raises:
        BrokenDocument: see `read_parts`; also a modality without a tokenizer.
    """
    runs: list[np.ndarray] = [np.array([vocabulary.bos])]
    spans = []
    length = 1
    for modality, content in read_parts(shard, entry, tokenizers):
        if modality not in tokenizers:
            raise BrokenDocument(f"it has {modality}, for which the recipe has no tokenizer")
        ids = np.asarray(tokenizers[modality].encode(content), dtype=np.int32) + vocabulary.range(modality)[0]
        if modality != "text":
            ids = np.concatenate([[vocabulary.begin(modality)], ids, [vocabulary.end(modality)]])
            spans.append((length, length + len(ids)))
        runs.append(ids)
        length += len(ids)
    runs.append(np.array([vocabulary.eos]))
    return np.concatenate(runs).astype(np.int32), spans


def _parts(shard: BinaryIO, entry: Entry) -> list:
    try:
        parts = json.loads(read_member(shard, entry, "json"))["parts"]
    except (ValueError, KeyError, TypeError) as error:
        raise BrokenDocument(f'its JSON is not {{"parts": […]}} ({type(error).__name__}: {error})') from None
    if not isinstance(parts, list) or not parts:
        raise BrokenDocument('its "parts" is no list with an entry')
    return parts


def _text(text: Any, number: int) -> str:
    if not isinstance(text, str):
        raise BrokenDocument(f'text part {number} has no string "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell lone surrogates, which are no text
        raise BrokenDocument(f"text part {number} is no valid Unicode ({error.reason})") from None
    return text


def _decode(shard: BinaryIO, entry: Entry, modality: str, file: Any) -> Any:
    if not isinstance(file, str):
        raise BrokenDocument(f'{modality} part names no "file"')
    content = read_member(shard, entry, file)
    try:
        return DECODERS[modality](content)
    except Exception as error:  # decoders raise anything for bytes they cannot read: OSError, SyntaxError, struct.error
        raise BrokenDocument(f"{file} does not decode ({type(error).__name__}: {error})") from None


def read_member(shard: BinaryIO, entry: Entry, extension: str) -> bytes:
    """The bytes of one file of a document.

    Raises:
        BrokenDocument: it has no such file.
    """
    member = entry.find(extension)
    if member is None:
        raise BrokenDocument(f"its file {entry.key}.{extension} is missing")
    shard.seek(member.offset)
    return shard.read(member.size)
