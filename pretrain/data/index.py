"""The index of a shard: what it is, and the tokens of its documents.

Two records, both made once. The *listing* (`NAME-PLACE.listing.npz`) says what the shard holds: the hash of its
content, and how many documents. It is made again when the size or the modification time of a file changes. The *tokens*
(`CHECKSUM-MODALITIES.npy` with `….npz` beside it, and `…-NAME.bin` for each modality whose positions carry no ids)
depend on the content of the shard and on the modalities, so they carry both in their name; they are mapped into memory,
never read whole.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pretrain.data.errors import BrokenDocument, DataError, shown
from pretrain.data.items import stored
from pretrain.data.reading import Tokens, tokenize
from pretrain.data.sources import Document, Shard, Source
from pretrain.data.strings import Strings
from zoo.files import atomic_path
from zoo.modalities import Modality, grammars

REASON = 500
"""Characters of the reason why a document is skipped, at most."""
LISTING = ("stamp", "checksum", "documents")
TOKENS = ("keys", "keys_stops", "starts", "text_bytes", "spans", "modality", "skipped", "skipped_stops")
"""What a record holds."""


class Skipped(NamedTuple):
    """A document that could not be used."""

    shard: str
    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a shard holds."""

    source: Source
    shard: Shard
    checksum: str
    """Hash of its documents, wherever they lie."""
    documents: int
    """How many there are, usable or not."""

    def __len__(self) -> int:
        return self.documents


@dataclasses.dataclass(frozen=True)
class ShardTokens:
    """The usable documents of a shard as one array of tokens."""

    tokens: np.ndarray
    """(n,) int32, mapped from disk."""
    keys: Strings
    """The key of each of the d documents."""
    starts: np.ndarray
    """(d + 1,) int64: document i is tokens[starts[i] : starts[i + 1]]."""
    text_bytes: np.ndarray
    """(d,) int64, UTF-8 bytes of the texts of each document."""
    spans: np.ndarray
    """(s, 2) int64, ascending: [start, stop) in `tokens` of what must never be cut."""
    modality: np.ndarray
    """(s,) int8, number of the modality of each span, in the order of the vocabulary."""
    skipped: list[Skipped]
    content: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """What the positions carry of each modality that carries no ids, (n, …), one row a position, mapped from disk."""


def list_shard(source: Source, shard: Shard, cache: Path) -> Listing:
    """The listing of a shard, from the cache where it is up to date.

    Raises:
        DataError: see `Source.open`.
    """
    place = hashlib.sha256(f"{source.options} {shard.place}".encode()).hexdigest()[:16]  # folders may share a cache
    record = cache / f"{re.sub('[^A-Za-z0-9._-]', '_', shard.name)[-64:]}-{place}.listing.npz"
    stamp = source.stamp(shard)
    arrays = _load(record, LISTING)
    if arrays is None or str(arrays["stamp"]) != stamp:
        with source.open(shard, cache) as documents:
            count = len(documents)
        arrays = {"checksum": np.array(source.identity(shard, cache)), "documents": np.array(count)}
        _save(record, stamp=np.array(stamp), **arrays)
    return Listing(source, shard, str(arrays["checksum"]), int(arrays["documents"]))


def shard_tokens(
    listing: Listing, cache: Path, fingerprint: str, modalities: Mapping[str, Modality]
) -> ShardTokens | None:
    """The tokens of a shard under the modalities of `fingerprint`, or None where they have not been made."""
    record, flat = _names(listing, cache, fingerprint)
    arrays = _load(record, TOKENS)
    if arrays is None:
        return None
    try:
        # An empty array cannot be mapped.
        tokens = _mapped_npy(flat) if arrays["starts"][-1] else np.zeros(0, np.int32)
        content = {}
        for number, (name, modality) in enumerate(modalities.items()):
            form = stored(modality.config.carries)
            if form is not None:
                spans = arrays["spans"][arrays["modality"] == number]
                content[name] = _mapped(_beside(flat, name), *form, rows=int((spans[:, 1] - spans[:, 0] - 2).sum()))
    except (OSError, ValueError, EOFError):
        return None
    skipped = Strings.named("skipped", arrays).tolist()
    return ShardTokens(
        tokens,
        Strings.named("keys", arrays),
        arrays["starts"],
        arrays["text_bytes"],
        arrays["spans"],
        arrays["modality"],
        [Skipped(shown(listing.shard.name), *each) for each in zip(skipped[::2], skipped[1::2], strict=True)],
        content,
    )


def tokenize_shard(
    listing: Listing,
    cache: Path,
    fingerprint: str,
    modalities: Mapping[str, Modality],
    advance: Callable[[int], Any],
) -> None:
    """Make the tokens of a shard; `advance(1)` is called after each document. Decoding runs in threads."""
    keys, lengths, text_bytes, spans, skipped, runs = [], [], [], [], [], []
    start = 0
    record, flat = _names(listing, cache, fingerprint)
    with contextlib.ExitStack() as writing:
        files = {
            name: writing.enter_context(open(writing.enter_context(atomic_path(_beside(flat, name))), "wb"))
            for name, modality in modalities.items()
            if stored(modality.config.carries) is not None
        }
        documents = writing.enter_context(listing.source.open(listing.shard, cache))
        results = writing.enter_context(_tokenized(documents, modalities))
        for document, result in zip(documents, results, strict=True):
            advance(1)
            if isinstance(result, str):
                skipped += [shown(document.key), shown(result, REASON)]
                continue
            keys.append(document.key)
            lengths.append(len(result.tokens))
            text_bytes.append(result.text_bytes)
            spans += [(start + span.start, start + span.stop, span.modality) for span in result.spans]
            runs.append(result.tokens)
            start += len(result.tokens)
            for carried in result.content:
                files[carried.modality].write(carried.values.tobytes())
    with atomic_path(flat) as temporary, open(temporary, "wb") as file:
        np.save(file, np.concatenate([np.zeros(0, np.int32), *runs]))
    table = np.array(spans, dtype=np.int64).reshape(-1, 3)
    _save(
        record,  # last: where it exists, the tokens do too
        **Strings.pack(keys).arrays("keys"),
        starts=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        text_bytes=np.array(text_bytes, dtype=np.int64),
        spans=table[:, :2],
        modality=table[:, 2].astype(np.int8),
        **Strings.pack(skipped).arrays("skipped"),
    )


@contextlib.contextmanager
def _tokenized(documents: Sequence[Document], modalities: Mapping[str, Modality]) -> Iterator[Iterator[Tokens | str]]:
    """What became of each document of a shard, in order: its tokens, or why it is broken."""
    rules = grammars({name: modality.config for name, modality in modalities.items()})

    def work(document: Document) -> Tokens | str:
        try:
            return tokenize(document, modalities, rules)
        except BrokenDocument as broken:
            return str(broken)
        except RecursionError:
            return "its JSON is nested too deeply"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        yield pool.map(work, documents)


def _names(listing: Listing, cache: Path, fingerprint: str) -> tuple[Path, Path]:
    stem = f"{listing.checksum[:32]}-{fingerprint[:16]}"
    return cache / f"{stem}.npz", cache / f"{stem}.npy"


def _beside(flat: Path, modality: str) -> Path:
    """The file of what the positions of a modality carry, beside that of the tokens."""
    return flat.with_name(f"{flat.stem}-{modality}.bin")


def _mapped(path: Path, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> np.ndarray:
    """(rows, …) of a file that holds nothing else.

    Raises:
        ValueError: it is of another size.
    """
    content = _map(path).view(dtype) if rows else np.zeros(0, dtype)  # an empty file cannot be mapped
    return content.reshape(rows, *shape)


def _mapped_npy(path: Path) -> np.ndarray:
    """(n,) int32 of a file that NumPy wrote.

    Raises:
        ValueError: it is none, or has lost its end.
    """
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start = file.tell()
    if dtype != np.int32:
        raise ValueError(f"{path} holds {dtype}")
    return _map(path)[start:].view(np.int32).reshape(shape)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file, read when they are needed.

    Python's own maps keep the file open, and a data set has more shards than a process may have open files.

    Raises:
        DataError: the system allows no more maps.
    """
    try:
        content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]})") from None
    content.flags.writeable = False
    return content


def _load(path: Path, names: Collection[str]) -> dict[str, np.ndarray] | None:
    """The arrays of a record, or None where there is none that holds those of `names`: it is then made again."""
    try:
        with np.load(path) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(f"{path}: cannot be opened ({error.strerror}); raise the limit with ulimit -n") from None
        return None  # whatever a file that lost its end, or a bit of it, makes numpy raise
    return found if found.keys() >= set(names) else None


def _save(path: Path, **arrays: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
