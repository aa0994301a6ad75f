"""`open_data`: from the `data` section of a recipe to streams of packed rows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain.data.cache import Waiting, cache_folder, locked, room_for, writing
from pretrain.data.config import SHORT, DataConfig, check_length
from pretrain.data.documents import Documents
from pretrain.data.errors import DataError
from pretrain.data.fitting import fingerprint, load_modalities
from pretrain.data.index import OpenShards, Skipped, TokenRecord
from pretrain.data.mixture import Mixture
from pretrain.data.packing import TokenStream
from pretrain.data.ratio import weights_for
from pretrain.data.workers import Indexed, Indexer, Task, find_tasks, index_all
from zoo.carries import Ids, Vectors
from zoo.modalities import Grammar, Modalities, Modality, Vocabulary, grammars, vocabulary

CHUNK = 1 << 16
READING = 2
"""Counted up whenever the library makes other tokens of the same files."""
NAMED = 5
"""How many broken documents an error lists."""
KEPT = 1000
"""How many of them `Data` names."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Opened data: streams, vocabulary, modalities."""

    train: Mixture
    validation: Mixture | None
    vocabulary: Vocabulary
    modalities: Mapping[str, Modality]
    """Ready for use, in the order of the recipe."""
    skipped: list[Skipped]
    """Documents that could not be used: the first thousand."""
    fingerprint: str
    """Hash of the training documents' content, of the modalities and of the weights; equal means the same token stream,
    wherever the shards and the cache lie."""
    validation_fingerprint: str
    """The same of the validation documents."""
    balanced: bool = False
    """Whether the rows of a step are dealt so that micro-batches hold modalities alike."""

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
        mixture = self._mixture(split)
        counts = np.zeros(self.vocabulary.size)
        for name, stream in mixture.streams.items():
            # of a mixture: as often as its rows come
            often = 1.0 if len(mixture.streams) == 1 else mixture.shares[name] / stream.rows_per_epoch
            counts += often * stream.documents.frequencies(stream.sequence_length)
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
        streams = self._mixture(split).streams.values()
        vectors = [n for n, modality in self.modalities.items() if isinstance(modality.config.carries, Vectors)]
        return {n: _variance([s.content[n] for stream in streams for s in stream.documents.shards]) for n in vectors}

    def _mixture(self, split: str) -> Mixture:
        mixture = {"train": self.train, "validation": self.validation}[split]
        if mixture is None:
            raise ValueError(f"the data has no {split} split")
        return mixture


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
    tasks = find_tasks(config)
    cache = cache_folder(config.folder, config.cache)
    with locked(cache, log) as waiting, room_for(cache):
        indexer = _indexer(tasks, modalities, cache, log)
        found = _all_indexed(indexer, tasks, config.workers, log, waiting)
        skipped = _check_broken(found, config, log)
        making = _Making(config, modalities, found, indexer, log)
        train, held_out = making.mixture("train", seed), making.mixture("validation", None)
    assert train is not None, "every source has training shards"
    return Data(
        train,
        held_out,
        vocabulary(modalities),
        indexer.modalities,
        skipped,
        making.identity("train", train),
        making.identity("validation", held_out),
        config.token_ratio is not None,
    )


def tokenize_part(config: DataConfig, modalities: Modalities, part: int, parts: int, log: Callable[[str], None]) -> int:
    """Index one of several equal shares of the shards, which other machines that share the cache need not do again.

    Args:
        part: which share, from 1 to `parts`.
    Returns:
        how many shards it has.
    Raises:
        UserError: as `open_data`.
    """
    check_length(config, modalities)
    tasks = find_tasks(config)
    cache = cache_folder(config.folder, config.cache)
    with locked(cache, log), room_for(cache):
        indexer = _indexer(tasks, modalities, cache, log)
    own = [task for source in tasks.values() for task in source][part - 1 :: parts]
    with writing(cache), room_for(cache):
        index_all(indexer, [task for task in own if indexer.find(task) is None], config.workers, log, Waiting(cache))
    return len(own)


def _indexer(
    tasks: Mapping[str, Sequence[Task]], modalities: Modalities, cache: Path, log: Callable[[str], None]
) -> Indexer:
    """What shards are indexed with: the modalities, which learn first what they have to."""
    training = [task for source in tasks.values() for task in source if task.split.name == "train"]
    ready = load_modalities(modalities, training, cache, log)
    configs = [modality.config.model_dump(mode="json", exclude={"path"}) for modality in ready.values()]
    content = json.dumps([READING, fingerprint(ready), configs], sort_keys=True)
    return Indexer(cache, hashlib.sha256(content.encode()).hexdigest(), ready)


def _all_indexed(
    indexer: Indexer,
    tasks: Mapping[str, Sequence[Task]],
    workers: int | None,
    log: Callable[[str], None],
    waiting: Waiting,
) -> dict[str, list[Indexed]]:
    """The shards of each source, indexed."""
    index_all(
        indexer, [t for source in tasks.values() for t in source if indexer.find(t) is None], workers, log, waiting
    )
    found = {name: [indexer.find(task) for task in source] for name, source in tasks.items()}
    whole = {name: [shard for shard in shards if shard is not None] for name, shards in found.items()}
    if whole != found:
        raise DataError("data: a shard has changed while it was indexed; give the same command again")
    return whole


@dataclasses.dataclass(frozen=True)
class _Making:
    """Streams from indexed shards."""

    config: DataConfig
    modalities: Modalities
    found: Mapping[str, Sequence[Indexed]]
    indexer: Indexer
    log: Callable[[str], None]

    def mixture(self, split: str, seed: int | None) -> Mixture | None:
        """The stream of a split; None where no source has any.

        Raises:
            DataError: none of the documents of a source can be used.
        """
        streams = {
            name: self._stream(name, split, [shard.records[split] for shard in shards if split in shard.records], seed)
            for name, shards in self.found.items()
            if any(split in shard.records for shard in shards)
        }
        if not streams:
            return None
        weights = {name: self.config.entries[name].config.weight for name in streams}
        if self.config.token_ratio is not None:
            weights = weights_for(self.config.token_ratio, weights, streams)
            moved = ", ".join(f"{name} {weight:.2%}" for name, weight in weights.items())
            self.log(f"data.token_ratio: {split}: rows come from {moved}")
        return Mixture(streams, weights, seed)

    def _stream(self, source: str, split: str, records: Sequence[TokenRecord], seed: int | None) -> TokenStream:
        words = vocabulary(self.modalities)
        sizes = np.array([(record.tokens, record.documents) for record in records], np.int64)
        name = hashlib.sha256("".join(record.folder.name + record.digest for record in records).encode()).hexdigest()[
            :32
        ]
        counts = {modality: sum(record.counts[modality] for record in records) for modality in words.modalities}
        opened = OpenShards(records, self.indexer.modalities)
        documents = Documents.of(opened, sizes, words, self.modalities, name, counts)
        if not len(documents):
            key = self.config.entries[source].pattern(split)
            raise DataError(f"{key}: none of the documents can be used; see the reasons of the skipped ones")
        stream = TokenStream(documents, self.config.sequence_length, seed, self.indexer.cache)
        which = split if source == SHORT else f"{source}, {split}"
        self.log(
            f"{which}: {len(documents):,} documents, {documents.total:,} tokens, {stream.rows_per_epoch:,} rows of "
            f"{stream.sequence_length} an epoch, {stream.share_of_padding:.1%} padding"
        )
        return stream

    def identity(self, split: str, mixture: Mixture | None) -> str:
        """Hash of what the shards of a split hold, what was made of it and how it is mixed, wherever they lie."""
        content = [
            [
                [shard.checksum, shard.records[split].digest, shard.task.split.held_out]
                for shard in shards
                if split in shard.records
            ]
            for shards in self.found.values()
        ]
        shares = [] if mixture is None else mixture.rows_per_block.tolist()
        what = json.dumps([READING, fingerprint(self.indexer.modalities), content, shares])
        return hashlib.sha256(what.encode()).hexdigest()


def _check_broken(
    found: Mapping[str, Sequence[Indexed]], config: DataConfig, log: Callable[[str], None]
) -> list[Skipped]:
    """The first of the documents that cannot be used.

    Raises:
        DataError: they are too many.
    """
    records = [record for shards in found.values() for shard in shards for record in shard.records.values()]
    count, skipped = sum(record.skipped for record in records), []
    for record in records:
        if record.skipped and len(skipped) < KEPT:
            skipped += record.skips()[: KEPT - len(skipped)]
    lines = [f"{shard}: {key}: {reason}" for shard, key, reason in skipped[:NAMED]]
    if count > NAMED:
        lines.append(f"… and {count - NAMED:,} more")
    if count > config.max_broken_documents:
        raise DataError(
            f"data.max_broken_documents: {config.max_broken_documents}: {count:,} documents cannot be "
            f"used; repair them or set it to at least {count}:\n  " + "\n  ".join(lines)
        )
    if count:
        log(f"skipping {count:,} broken documents:\n  " + "\n  ".join(lines))
    lost: dict[str, tuple[int, str]] = {}
    for record in records:
        for kind, (times, example) in record.lost.items():
            before, first = lost.get(kind, (0, f"{record.shard}: {example}"))
            lost[kind] = before + times, first
    if lost:
        told = [f"{times:,} × {kind}, such as {example}" for kind, (times, example) in sorted(lost.items())]
        log("left out of documents that are used:\n  " + "\n  ".join(told))
    return skipped
