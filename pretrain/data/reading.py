"""One document: from the bytes of its parts to items, and from items to tokens.

Its tokens are `<bos>`, the tokens of each part, `<eos>`; a part that is not text stands between its begin and end
token.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.errors import BrokenDocument, DataError, shown
from pretrain.data.items import stored
from pretrain.data.sources import Document, Loss
from zoo.config import UserError
from zoo.modalities import PARTS, Grammar, Modality, Vocabulary

ADDRESS = re.compile(r" ?<_io\.BytesIO object at 0x[0-9a-f]+>")
"""What Pillow calls a file that it has from us; it would be another in every process."""

Readers = Mapping[str, Callable[[bytes], Any]]
"""Type of a part → what makes its item from the bytes of its file, or of its text."""


class DocumentPart(NamedTuple):
    """One part of a document."""

    type: str
    """What the document calls it: text, image, audio, video, or a type of a user's own."""
    item: Any
    """What its reader has made of it; None where there is no reader for its type."""


def read_parts(document: Document, readers: Readers) -> Iterator[DocumentPart]:
    """The parts of a document, in order. Files of types without a reader are not looked at.

    Raises:
        BrokenDocument: see `Document.contents`; also a part of an unknown type, or a file that does not decode.
    """
    known = list(dict.fromkeys((*PARTS, *readers)))
    for number, part in enumerate(document.contents().parts):
        if part.type not in known:
            raise BrokenDocument(f"part {number} has type {shown(repr(part.type))}; known: {', '.join(known)}")
        reader = readers.get(part.type)
        yield DocumentPart(part.type, None if reader is None else _item(reader, part.name, part.read()))


def _item(reader: Callable[[bytes], Any], name: str, content: bytes) -> Any:
    try:
        return reader(content)
    except MemoryError:  # passes, so it says nothing about the document
        raise DataError(f"{name}: the memory does not suffice to decode it; free some and start again") from None
    except UserError:  # a missing package says nothing about it either
        raise
    except Exception as error:  # decoders raise anything for bytes they cannot read: OSError, struct.error
        why = ADDRESS.sub("", str(error))
        raise BrokenDocument(f"{name} does not decode ({type(error).__name__}: {why})") from None


class Span(NamedTuple):
    """A stretch of a document's tokens that must never be cut: one item of a modality with its markers."""

    start: int
    stop: int
    """The token after the last."""
    modality: int
    """Its number in the order of the vocabulary."""


class Carried(NamedTuple):
    """What the positions of one item carry where they carry no ids."""

    modality: str
    values: np.ndarray
    """(n, …), one row a position, as it is kept on disk."""


class Tokens(NamedTuple):
    """A document, tokenised."""

    tokens: np.ndarray
    """(n,) int32; where a position carries no id, the one that holds its place."""
    spans: list[Span]
    """The stretches that must never be cut, in order."""
    content: list[Carried]
    """The content of each part whose positions carry no ids, in order."""
    text_bytes: int = 0
    """UTF-8 bytes of its texts."""
    losses: Sequence[Loss] = ()
    """What was left out of it, although the rest is used."""


def tokenize(document: Document, modalities: Mapping[str, Modality], grammars: Mapping[str, Grammar]) -> Tokens:
    """Tokens of a document.

    Args:
        grammars: of the modalities.
    Raises:
        BrokenDocument: see `read_parts`; also a part that no modality reads, an item that its modality cannot encode,
            one of more positions than that allows, or one whose numbers are not finite.
    """
    contents = document.contents()
    made = Tokens(np.zeros(0), [], [], losses=contents.losses)
    runs: list[np.ndarray] = [np.array([Vocabulary.bos])]
    length, text_bytes = 1, 0
    names = {modality.config.part: name for name, modality in modalities.items()}
    document = Document(document.key, lambda: contents)  # it is read once
    for part in read_parts(document, {kind: modalities[name].config.read for kind, name in names.items()}):
        if part.type not in names:
            raise BrokenDocument(f"it has {part.type}, for which the recipe has no modality")
        name = names[part.type]
        text_bytes += len(part.item.encode()) if isinstance(part.item, str) else 0
        grammar, content = grammars[name], _encoded(name, modalities[name], part.item)
        allowed, form = grammar.positions, stored(grammar.carries)
        if form is not None:
            made.content.append(Carried(name, _checked(content, form, part.type)))
        if allowed is not None and not allowed.least <= len(content) <= allowed.most:
            raise BrokenDocument(
                f"its {part.type} takes {len(content)} positions, modalities.{name} allows {allowed.least} to "
                f"{allowed.most}"
            )
        ids = grammar.tokens(content)
        if allowed is not None:
            made.spans.append(Span(length, length + len(ids), grammar.choice.modality))
        runs.append(ids)
        length += len(ids)
    runs.append(np.array([Vocabulary.eos]))
    return made._replace(tokens=np.concatenate(runs).astype(np.int32), text_bytes=text_bytes)


def _encoded(name: str, modality: Modality, item: Any) -> np.ndarray:
    """What the positions of an item carry."""
    try:
        return np.asarray(modality.encode(item))
    except MemoryError:
        raise DataError(f"modalities.{name}: the memory does not suffice to encode an item; free some") from None
    except Exception as error:  # a user's own modality may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise BrokenDocument(
            f"modalities.{name} cannot encode its {modality.config.part} ({type(error).__name__}: {error}, in "
            f"{place.filename} line {place.lineno})"
        ) from None


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
