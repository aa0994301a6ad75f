"""The data path on a user's own shards: tokenising by workers, padding, and rows against what a model takes."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

from pretrain.data import DataConfig, Mixture, micro_batches, open_data
from pretrain.data.fitting import fingerprint, load_modalities
from pretrain.data.workers import Indexer, Task, find_tasks, index_in_processes
from tools.bench.benchmark import HIGHER, LOWER, Comparison, Goal, Group, Settings, TableRow, benchmark
from tools.bench.data import DEMAND, LENGTH
from tools.bench.measure import STEP
from zoo.modalities import Modalities, parse_modalities

MICRO_BATCH = 4
WORKERS = (1, 2)
WIDE = {64: 4, 256: 2}
"""Positions of a picture of 32 × 32 pixels → side of its patches."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast shards were tokenised."""

    documents: int
    size: int
    """Bytes of the shards."""
    seconds: float

    def __str__(self) -> str:
        return f"{self.documents / self.seconds:,.0f} documents and {self.size / self.seconds / 1e6:.1f} MB a second"


def data_config(folder: Path, cache: str) -> DataConfig:
    """All shards of a folder as training data."""
    keys = {"path": str(folder), "train": "*.tar", "validation": None, "cache": cache, "sequence_length": LENGTH}
    return DataConfig.parse(keys | {"max_broken_documents": 10**9}, "data")


def modalities(positions: int) -> Modalities:
    """A BPE of 4,096 and pictures of so many positions."""
    image = {"type": "patches", "image_size": 32, "patch": WIDE[positions], "codes": 512}
    return parse_modalities({"text": {"type": "bpe", "vocab_size": 4096}, "image": image})


def tokenising(config: DataConfig, cache: Path, workers: int) -> Rate:
    """Tokenise all shards in so many processes, whose start does not count.

    Args:
        cache: what modalities have learned from these shards lies there.
    """
    tasks: list[Task] = [task for found in find_tasks(config).values() for task in found]
    ready = load_modalities(modalities(64), tasks, cache, lambda line: None)
    with tempfile.TemporaryDirectory() as empty:
        indexer = Indexer(Path(empty), fingerprint(ready), ready)
        begun, before, documents = 0.0, 0, 0
        for _, documents in index_in_processes(indexer, tasks, workers):
            begun, before = (begun, before) if begun else (time.perf_counter(), documents)
        seconds = time.perf_counter() - begun
    size = sum(Path(task.shard.url).stat().st_size for task in tasks)
    return Rate(documents - before, size, seconds)


@dataclasses.dataclass
class Reading:
    """A task that makes the next rows of a rank into batches."""

    stream: Mixture
    cache: tempfile.TemporaryDirectory[str]
    """In which the stream's files lie; it goes when nobody holds it any more."""
    position: int = 0

    def __call__(self) -> None:
        micro_batches(self.stream, range(self.position, self.position + MICRO_BATCH), MICRO_BATCH)
        self.position += MICRO_BATCH


@benchmark("data.real")
def real(settings: Settings) -> Group:
    """Documents of --data FOLDER in rows of 1,024: tokenising by worker processes (BPE of 4,096, pictures of 64
    positions), share of padding, and rows as batches a second over the 50 that a rank takes at most."""
    folder = settings.documents()
    cache = tempfile.TemporaryDirectory()
    config = data_config(folder, cache.name)
    streams = {wide: open_data(config, modalities(wide), 0, lambda line: None).train for wide in WIDE}
    rates = {workers: tokenising(config, Path(cache.name), workers) for workers in WORKERS}
    one, two = (rate.seconds / max(rate.documents, 1) for rate in rates.values())
    note = "; ".join(f"{workers} workers: {rate}" for workers, rate in rates.items())
    figures = [
        TableRow("a document: 2 workers, 1 worker", STEP, 1e3 * two, 1e3 * one, two / one, LOWER, 0.6, None, note=note)
    ]
    for wide, mixture in streams.items():
        (stream,) = mixture.streams.values()
        name = f"share of padding, pictures of {wide} positions"
        figures.append(TableRow(name, STEP, None, None, stream.share_of_padding, LOWER, 0.03, None))
    demand = Comparison(
        "a micro-batch of 4 rows",
        None,
        HIGHER,
        {STEP: Goal(5.0)},
        floor_ms={STEP: 1e3 * MICRO_BATCH / DEMAND},
        label="rows a second over the demand of a rank",
    )
    return Group({STEP: {demand.ours: Reading(streams[64], cache)}}, [demand], figures)
