"""`open_data`: from the `data` section of a recipe to streams of packed rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import tqdm

from pretrain.data.cache import cache_folder, locked, room_for
from pretrain.data.config import DataConfig, check_length
from pretrain.data.documents import Documents
from pretrain.data.errors import DataError
from pretrain.data.fitting import fingerprint, load_modalities
from pretrain.data.index import Listing, ShardTokens, Skipped, list_shard, shard_tokens, tokenize_shard
from pretrain.data.packing import TokenStream
from pretrain.data.shards import find_shards
from pretrain.data.sources import DocumentShards, Shard
from zoo.carries import Ids, Vectors
from zoo.modalities import Grammar, Modalities, Modality, Vocabulary, grammars, vocabulary

CHUNK = 1 << 16
READING = 2
"""Counted up whenever the library makes other tokens of the same files."""
NAMED = 5
"""How many broken documents an error lists."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Opened data: streams, vocabulary, modalities."""

    train: TokenStream
    validation: TokenStream | None
    vocabulary: Vocabulary
    modalities: Mapping[str, Modality]
    """Ready for use, in the order of the recipe."""
    skipped: list[Skipped]
    """Documents that could not be used."""
    fingerprint: str
    """Hash of the training shards' content and of the modalities; equal means the same token stream, wherever the
    shards and the cache lie."""
    validation_fingerprint: str
    """The same of the validation shards."""

    @property
    def grammars(self) -> dict[str, Grammar]:
        """How the items of each modality stand in the stream."""
        return grammars({name: modality.config for name, modality in self.modalities.items()})

    def unigram_entropy(self, split: str) -> dict[str, float]:
        """Entropy of single tokens of each modality, in nats per target token: the loss of the best constant
        guess.

        A target token is one with a predecessor in the same piece of a document; a modality without any is
        left out, and so is one whose positions carry no ids.

        Args:
            split: "train" or "validation".
        """
        stream = self._stream(split)
        counts = np.zeros(self.vocabulary.size, dtype=np.int64)
        for tokens in stream.documents.shards:
            counts += np.bincount(tokens, minlength=self.vocabulary.size)
        counts -= np.bincount(stream.documents.take(stream.pieces.starts), minlength=self.vocabulary.size)
        modality = self.vocabulary.modality_of(np.arange(self.vocabulary.size))
        entropy = {}
        for number, name in enumerate(self.vocabulary.modalities):
            seen = counts[(modality == number) & (counts > 0)]
            if seen.size and isinstance(self.modalities[name].config.carries, Ids):
                share = seen / seen.sum()
                entropy[name] = float(-(share * np.log(share)).sum())
        return entropy

    def constant_error(self, split: str) -> dict[str, float]:
        """Mean squared error of the best constant guess of each modality whose positions carry vectors: their variance.

        Args:
            split: "train" or "validation".
        """
        errors = {}
        for name, items in self._stream(split).documents.items.items():
            if isinstance(self.modalities[name].config.carries, Vectors):
                errors[name] = _variance(items.content)
        return errors

    def _stream(self, split: str) -> TokenStream:
        stream = {"train": self.train, "validation": self.validation}[split]
        if stream is None:
            raise ValueError(f"the data has no {split} split")
        return stream


def _variance(content: Sequence[np.ndarray]) -> float:
    """Variance of vectors (n, width) in several arrays, a mean over their numbers; 0 without any."""
    count, total, squares = 0, np.zeros(()), np.zeros(())
    for array in content:
        for start in range(0, len(array), CHUNK):
            part = array[start : start + CHUNK].astype(np.float64)
            count, total, squares = count + len(part), total + part.sum(0), squares + (part**2).sum(0)
    return float((squares / max(count, 1) - (total / max(count, 1)) ** 2).mean())


def open_data(config: DataConfig, modalities: Modalities, seed: int, log: Callable[[str], None] = print) -> Data:
    """Index the shards (once; kept in the cache), train the tokenizers (once), and open the streams.

    Every rank may call this at the same time: one does the work, the others wait for it and read.

    Args:
        modalities: of the recipe, by name.
        seed: of the order of the training documents.
        log: is told what is being done, one line each.
    Raises:
        DataError: no shard, an unreadable shard, too many broken documents; names the file and the way out.
        UserError: a modality's file does not fit, or an item of it does not fit into a row.
    """
    check_length(config, modalities)
    train, validation = _shards(config)
    cache = cache_folder(Path(config.path), config.cache)
    words = vocabulary(modalities)
    source = DocumentShards(DocumentShards.Config(path=config.path))
    with locked(cache, log), room_for(cache):
        listings = [
            list_shard(source, Shard(str(shard)), cache)
            for shard in tqdm.tqdm(train + validation, desc="listing shards", unit="shard", disable=None, leave=False)
        ]
        ready = load_modalities(modalities, listings[: len(train)], cache, log)
        name = _token_name(ready)
        _index(listings, cache, name, ready, log)
    made = [shard_tokens(listing, cache, name, ready) for listing in listings]
    tokens = [shard for shard in made if shard is not None]
    assert len(tokens) == len(listings), "all have just been made"
    skipped = [broken for shard in tokens for broken in shard.skipped]
    _check_broken(skipped, config, log)
    splits = {"train": tokens[: len(train)], "validation": tokens[len(train) :]}
    streams = {
        split: TokenStream(
            _documents(split, shards, modalities), config.sequence_length, seed if split == "train" else None
        )
        for split, shards in splits.items()
        if shards
    }
    for split, stream in streams.items():
        log(_described(split, stream))
    meant = fingerprint(ready)
    return Data(
        streams["train"],
        streams.get("validation"),
        words,
        ready,
        skipped,
        _identity(meant, listings[: len(train)], tokens[: len(train)]),
        _identity(meant, listings[len(train) :], tokens[len(train) :]),
    )


def _token_name(modalities: Mapping[str, Modality]) -> str:
    """Hash of everything that decides what becomes of a document: tokens in the cache go by it."""
    configs = [modality.config.model_dump(mode="json", exclude={"path"}) for modality in modalities.values()]
    content = json.dumps([READING, fingerprint(modalities), configs], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _identity(modalities: str, listings: Sequence[Listing], tokens: Sequence[ShardTokens]) -> str:
    """Hash of what the shards of a split hold and what was made of it, wherever they lie.

    Args:
        modalities: their fingerprint.
    """
    content = [
        [listing.checksum, [broken.key for broken in shard.skipped]]
        for listing, shard in zip(listings, tokens, strict=True)
    ]
    return hashlib.sha256(json.dumps([READING, modalities, content]).encode()).hexdigest()


def _shards(config: DataConfig) -> tuple[list[Path], list[Path]]:
    """The shards of training and of validation.

    Raises:
        DataError: no shard, or one that is in both.
    """
    folder = Path(config.path)
    train = find_shards(folder, config.train, "data.train")
    validation = [] if config.validation is None else find_shards(folder, config.validation, "data.validation")
    shared = sorted({path.name for path in train} & {path.name for path in validation})
    if shared:
        raise DataError(
            f"data.validation: {config.validation!r} and data.train: {config.train!r} both match {shared[0]}; "
            "make the patterns disjoint, or set data.validation to null"
        )
    return train, validation


def _described(split: str, stream: TokenStream) -> str:
    """How much there is of a split, for the log."""
    return (
        f"{split}: {len(stream.documents):,} documents, {stream.documents.total:,} tokens, "
        f"{stream.rows_per_epoch:,} rows of {stream.sequence_length} an epoch, "
        f"{stream.share_of_padding:.1%} padding"
    )


def _index(
    listings: list[Listing],
    cache: Path,
    name: str,
    modalities: Mapping[str, Modality],
    log: Callable[[str], None],
) -> None:
    """Tokenise the shards that have not been."""
    todo = [listing for listing in listings if shard_tokens(listing, cache, name, modalities) is None]
    if not todo:
        return
    count = sum(map(len, todo))
    log(f"indexing {count:,} documents of {len(todo)} shards into {cache}")
    with tqdm.tqdm(total=count, desc="indexing", unit="document", disable=None, leave=False) as bar:
        for listing in todo:
            tokenize_shard(listing, cache, name, modalities, bar.update)


def _documents(split: str, shards: list, modalities: Modalities) -> Documents:
    documents = Documents.join(shards, vocabulary(modalities), modalities)
    if not len(documents):
        raise DataError(f"data.{split}: none of the documents can be used; see the reasons of the skipped ones")
    return documents


def _check_broken(skipped: list[Skipped], config: DataConfig, log: Callable[[str], None]) -> None:
    lines = [f"{shard}: {key}: {reason}" for shard, key, reason in skipped[:NAMED]]
    if len(skipped) > NAMED:
        lines.append(f"… and {len(skipped) - NAMED} more")
    if len(skipped) > config.max_broken_documents:
        raise DataError(
            f"data.max_broken_documents: {config.max_broken_documents}: {len(skipped)} documents cannot be "
            f"used; repair them or set it to at least {len(skipped)}:\n  " + "\n  ".join(lines)
        )
    if skipped:
        log(f"skipping {len(skipped)} broken documents:\n  " + "\n  ".join(lines))
