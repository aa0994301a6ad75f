"""The index of a shard: what it is, and the tokens of its documents.

Two records, both made once. The *listing* (`NAME-PLACE.listing.npz`) says what the shard holds: the hash of its
content, and how many documents. It is made again when the size or the modification time of a file changes. The *tokens*
(`CHECKSUM-MODALITIES.tokens`, a folder) depend on the content of the shard and on the modalities, so they carry both in
their name. Of a folder of tokens only `record.json` is read at a start; the arrays are mapped into memory where rows
need them, and names are read where a message needs them.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import functools
import hashlib
import json
import mmap
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

from pretrain.data.errors import BrokenDocument, DataError, shown
from pretrain.data.items import Items, ShardTokens, stored
from pretrain.data.reading import Tokens, tokenize
from pretrain.data.sources import Document, Shard, Source, share
from pretrain.data.strings import Strings
from zoo.files import atomic_path
from zoo.modalities import Modality, grammars, vocabulary

REASON = 500
"""Characters of the reason why a document is skipped, at most."""
OPEN = 1024
"""Shards of a source that are mapped at a time: a system allows some ten thousand maps."""
LISTING = ("stamp", "checksum", "documents")
NAMES = ("keys", "keys_stops", "skipped", "skipped_stops")
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


def list_shard(source: Source, shard: Shard, cache: Path) -> Listing:
    """The listing of a shard, from the cache where it is up to date.

    Raises:
        DataError: see `Source.open`.
    """
    known = known_listing(source, shard, cache)
    if known is not None:
        return known
    stamp = source.stamp(shard)
    with source.open(shard, cache) as documents:
        count = len(documents)
    checksum = source.identity(shard, cache)
    with atomic_path(_listing(source, shard, cache)) as temporary, open(temporary, "wb") as file:
        arrays = {"stamp": np.array(stamp), "checksum": np.array(checksum), "documents": np.array(count)}
        np.savez(file, allow_pickle=False, **arrays)
    return Listing(source, shard, checksum, count)


def known_listing(source: Source, shard: Shard, cache: Path) -> Listing | None:
    """The listing of a shard in the cache, or None where there is none that is up to date."""
    arrays = _load(_listing(source, shard, cache), LISTING)
    if arrays is None or str(arrays["stamp"]) != source.stamp(shard):
        return None
    return Listing(source, shard, str(arrays["checksum"]), int(arrays["documents"]))


def _listing(source: Source, shard: Shard, cache: Path) -> Path:
    place = hashlib.sha256(f"{source.options} {shard.place}".encode()).hexdigest()[:16]  # folders may share a cache
    name = re.sub("[^A-Za-z0-9._-]", "_", shard.name)[-64:]
    return cache / f"{name}-{place}.listing.npz"


def _load(path: Path, names: Collection[str]) -> dict[str, np.ndarray] | None:
    """The arrays of a record, or None where there is none that holds those of `names`: it is then made again."""
    try:
        with np.load(path) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        _limited(error, path)
        return None  # whatever a file that lost its end, or a bit of it, makes numpy raise
    return found if found.keys() >= set(names) else None


# ------------------------------------------------------------------------------------------------------------- tokens


@dataclasses.dataclass(frozen=True)
class Split:
    """Which documents of a shard are meant."""

    name: str
    """"train" or "validation"."""
    held_out: float = 0.0
    """Share of the documents, by hash of their keys, that are validation's; 0: the shard belongs to one split as a
    whole."""

    @property
    def both(self) -> list[Split]:
        """The splits into which the shard is divided."""
        return [Split(name, self.held_out) for name in ("train", "validation")] if self.held_out else [self]

    def has(self, key: str) -> bool:
        """Whether the document of this key belongs to the split."""
        return not self.held_out or (share(key, "validation") < self.held_out) == (self.name == "validation")


@dataclasses.dataclass(frozen=True)
class TokenRecord:
    """What is known of the tokens of a shard without opening them."""

    folder: Path
    shard: str
    """Its name, for messages."""
    documents: int
    """Documents that can be used."""
    tokens: int
    counts: Mapping[str, int]
    """Tokens of each modality."""
    items: Mapping[str, int]
    """Items of each modality that has any."""
    skipped: int
    """Documents that cannot be used."""
    digest: str
    """Hash of their keys."""
    lost: Mapping[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """What was left out of documents that are used: reason → how often, and an example."""

    @classmethod
    def find(
        cls, listing: Listing, split: Split, cache: Path, fingerprint: str, modalities: Mapping[str, Modality]
    ) -> TokenRecord | None:
        """That of a shard under the modalities of `fingerprint`, or None where it has not been made or is damaged."""
        folder = _folder(listing, split, cache, fingerprint)
        try:
            content, _, check = (folder / "record.json").read_bytes().partition(b"\n")
            if zlib.crc32(content) != int(check, 16):
                return None
            record = cls(folder, shown(listing.shard.name), **json.loads(content))
            whole = all((folder / name).stat().st_size == size for name, size in record._sizes(modalities).items())
        except (OSError, ValueError) as error:
            _limited(error, folder)
            return None
        return record if whole else None

    def open(self, modalities: Mapping[str, Modality]) -> ShardTokens:
        """The tokens, mapped."""
        positions = self._positions(modalities)
        items = {
            name: Items(_mapped(self.folder / f"{name}.items", np.int64, (3, n))) for name, n in self.items.items()
        }
        forms = {name: stored(modality.config.carries) for name, modality in modalities.items()}
        content = {
            name: _mapped(self.folder / f"{name}.content", form[0], (positions[name], *form[1]), scattered=True)
            for name, form in forms.items()
            if form is not None
        }
        return ShardTokens(
            _mapped(self.folder / "tokens", np.int32, (self.tokens,), scattered=True),
            _mapped(self.folder / "starts", np.int64, (self.documents + 1,)),
            _mapped(self.folder / "text_bytes", np.int64, (self.documents,)),
            items,
            content,
        )

    def keys(self) -> list[str]:
        """The keys of the documents; empty where they cannot be read."""
        names = _load(self.folder / "names.npz", NAMES)
        return [] if names is None else Strings.named("keys", names).tolist()

    def skips(self) -> list[Skipped]:
        """The documents that cannot be used."""
        names = _load(self.folder / "names.npz", NAMES) if self.skipped else None
        words = [] if names is None else Strings.named("skipped", names).tolist()
        return [Skipped(self.shard, *each) for each in zip(words[::2], words[1::2], strict=True)]

    def _positions(self, modalities: Mapping[str, Modality]) -> dict[str, int]:
        """Positions of each modality that has items; markers count as text."""
        return {name: self.counts[name] for name in modalities if name in self.items}

    def _sizes(self, modalities: Mapping[str, Modality]) -> dict[str, int]:
        """Bytes of each file."""
        sizes = {"tokens": 4 * self.tokens, "starts": 8 * (self.documents + 1), "text_bytes": 8 * self.documents}
        for name, count in self.items.items():
            sizes[f"{name}.items"] = 24 * count
            form = stored(modalities[name].config.carries)
            if form is not None:
                dtype, shape = form
                sizes[f"{name}.content"] = int(np.prod(shape)) * dtype.itemsize * self.counts[name]
        return sizes


class OpenShards(Sequence[ShardTokens]):
    """The tokens of many shards, each mapped when it is asked for; those asked for last stay mapped."""

    def __init__(self, records: Sequence[TokenRecord], modalities: Mapping[str, Modality]) -> None:
        self._records = records
        self._open = functools.lru_cache(maxsize=OPEN)(lambda number: records[number].open(modalities))

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, number: int) -> ShardTokens: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[ShardTokens]: ...
    def __getitem__(self, number: int | slice) -> ShardTokens | Sequence[ShardTokens]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        return self._open(range(len(self))[number])

    def keys(self) -> list[str]:
        """The key of every document, in order; they are read from disk."""
        return [key for record in self._records for key in record.keys()]


def tokenize_shard(
    listing: Listing,
    split: Split,
    cache: Path,
    fingerprint: str,
    modalities: Mapping[str, Modality],
    advance: Callable[[int], Any],
    threads: int | None = None,
) -> None:
    """Make the tokens of a shard, of all its splits; `advance(1)` is called after each document.

    Args:
        threads: in which documents are decoded; default: as many as Python thinks fit.
    """
    with contextlib.ExitStack() as writing:
        writers = {
            each: Writer(writing.enter_context(atomic_path(_folder(listing, each, cache, fingerprint))), modalities)
            for each in split.both
        }
        documents = writing.enter_context(listing.source.open(listing.shard, cache))
        results = writing.enter_context(_tokenized(documents, modalities, threads))
        for document, result in zip(documents, results, strict=True):
            next(writer for each, writer in writers.items() if each.has(document.key)).add(document.key, result)
            advance(1)
        for writer in writers.values():
            writer.finish()


class Writer:
    """Writes the tokens of a shard into a folder, document by document.

    Args:
        folder: is made.
    """

    def __init__(self, folder: Path, modalities: Mapping[str, Modality]) -> None:
        folder.mkdir()
        self.folder = folder
        self.words = vocabulary({name: modality.config for name, modality in modalities.items()})
        self.carrying = [name for name, modality in modalities.items() if stored(modality.config.carries) is not None]
        names = ["tokens", *(f"{name}.content" for name in self.carrying)]
        self.files = {name: open(folder / name, "wb") for name in names}
        self.keys: list[str] = []
        self.skipped: list[str] = []
        self.lost: dict[str, tuple[int, str]] = {}
        self.lengths: list[int] = []
        self.text_bytes: list[int] = []
        self.counts = np.zeros(len(self.words.modalities), np.int64)
        self.items = {name: ([], []) for name, m in modalities.items() if m.config.positions is not None}

    def add(self, key: str, result: Tokens | str) -> None:
        """Write a document: its tokens, or why it cannot be used."""
        if isinstance(result, str):
            self.skipped += [shown(key), shown(result, REASON)]
            return
        first = int(self.counts.sum())
        for loss in result.losses:
            count, example = self.lost.get(loss.kind, (0, shown(f"{key}: {loss.example}", REASON)))
            self.lost[loss.kind] = count + 1, example
        self.keys.append(key)
        self.lengths.append(len(result.tokens))
        self.text_bytes.append(result.text_bytes)
        self.files["tokens"].write(result.tokens.tobytes())
        self.counts += np.bincount(self.words.modality_of(result.tokens), minlength=len(self.counts))
        for span in result.spans:
            starts, stops = self.items[self.words.modalities[span.modality]]
            starts.append(first + span.start + 1)  # between the markers
            stops.append(first + span.stop - 1)
        for carried in result.content:
            self.files[f"{carried.modality}.content"].write(carried.values.tobytes())

    def finish(self) -> None:
        """Write what is known at the end."""
        for file in self.files.values():
            file.close()
        np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64).tofile(self.folder / "starts")
        np.array(self.text_bytes, np.int64).tofile(self.folder / "text_bytes")
        for name, (starts, stops) in self.items.items():
            edges = np.array([starts, stops], np.int64)
            sizes = edges[1] - edges[0]
            np.stack([*edges, np.cumsum(sizes) - sizes]).tofile(self.folder / f"{name}.items")
        names = Strings.pack(self.keys).arrays("keys") | Strings.pack(self.skipped).arrays("skipped")
        with open(self.folder / "names.npz", "wb") as file:
            np.savez(file, allow_pickle=False, **names)
        about = {
            "documents": len(self.keys),
            "tokens": int(self.counts.sum()),
            "counts": dict(zip(self.words.modalities, self.counts.tolist(), strict=True)),
            "items": {name: len(starts) for name, (starts, _) in self.items.items()},
            "skipped": len(self.skipped) // 2,
            "lost": self.lost,
            "digest": hashlib.sha256(json.dumps(self.skipped[::2]).encode()).hexdigest(),
        }
        content = json.dumps(about).encode()
        (self.folder / "record.json").write_bytes(content + b"\n%08x" % zlib.crc32(content))


@contextlib.contextmanager
def _tokenized(
    documents: Sequence[Document], modalities: Mapping[str, Modality], threads: int | None
) -> Iterator[Iterator[Tokens | str]]:
    """What became of each document of a shard, in order: its tokens, or why it is broken."""
    rules = grammars({name: modality.config for name, modality in modalities.items()})

    def work(document: Document) -> Tokens | str:
        try:
            return tokenize(document, modalities, rules)
        except BrokenDocument as broken:
            return str(broken)
        except RecursionError:
            return "its JSON is nested too deeply"

    if threads == 1:
        yield map(work, documents)
        return
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        yield pool.map(work, documents)


def _folder(listing: Listing, split: Split, cache: Path, fingerprint: str) -> Path:
    part = f"-{split.held_out:g}-{split.name}" if split.held_out else ""
    return cache / f"{listing.checksum[:32]}-{fingerprint[:16]}{part}.tokens"


def _mapped(path: Path, dtype: Any, shape: tuple[int, ...], scattered: bool = False) -> np.ndarray:
    """The array that a file holds and nothing else, read when it is needed. An empty file cannot be mapped.

    Python's own maps keep the file open, and a data set has more shards than a process may have open files.

    Args:
        scattered: it is read in short stretches that lie anywhere. Without this hint a system reads up to some
            megabytes around each.
    Raises:
        DataError: the system allows no more maps.
    """
    if not all(shape):
        return np.zeros(shape, dtype)
    try:
        content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    except RuntimeError as error:
        raise DataError(f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]})") from None
    if scattered:
        place, size = ctypes.c_void_p(content.ctypes.data), ctypes.c_size_t(content.nbytes)
        ctypes.CDLL(None).madvise(place, size, mmap.MADV_RANDOM)
    content.flags.writeable = False
    return content.view(dtype).reshape(shape)


def _limited(error: Exception, path: Path) -> None:
    """Raise DataError where a file cannot be opened because too many are, which says nothing about the file."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise DataError(f"{path}: cannot be opened ({error.strerror}); raise the limit with ulimit -n") from None
