"""Indexing many shards: in this process, or in several of this machine, shard by shard.

A shard is the unit: its listing and its tokens are there as a whole or not at all, so that indexing which was
interrupted goes on with the shards that are missing, and several machines can share the work.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tqdm

from pretrain.data.cache import Waiting
from pretrain.data.config import DataConfig
from pretrain.data.errors import DataError
from pretrain.data.index import Listing, Split, TokenRecord, known_listing, list_shard, tokenize_shard
from pretrain.data.sources import Shard, Source
from zoo.modalities import Modality

PATIENCE = 20.0
"""Seconds that indexing may take before it is worth it to start further processes, each of which needs a few."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to be indexed."""

    source: Source
    shard: Shard
    split: Split


def find_tasks(config: DataConfig) -> dict[str, list[Task]]:
    """The shards of each source.

    Raises:
        DataError: a source has none, or one is in both splits.
    """
    found: dict[str, list[Task]] = {}
    for name, entry in config.entries.items():
        found[name] = [
            Task(source, shard, Split(split, entry.held_out))
            for split, (source, shards) in entry.shards().items()
            for shard in shards
        ]
    return found


@dataclasses.dataclass(frozen=True)
class Indexed:
    """A shard that has been indexed."""

    task: Task
    checksum: str
    """Hash of its content."""
    records: Mapping[str, TokenRecord]
    """What is known of the tokens of each split."""


@dataclasses.dataclass(frozen=True)
class Indexer:
    """What all shards are indexed with."""

    cache: Path
    fingerprint: str
    """The modalities' hash, which names what is made of a shard."""
    modalities: Mapping[str, Modality]

    def find(self, task: Task, listing: Listing | None = None) -> Indexed | None:
        """What is known of a shard; None where something of it is still to be made.

        Args:
            listing: of the shard; default: the one in the cache.
        """
        listing = listing or known_listing(task.source, task.shard, self.cache)
        if listing is None:
            return None
        records = {}
        for split in task.split.both:
            record = TokenRecord.find(listing, split, self.cache, self.fingerprint, self.modalities)
            if record is None:
                return None
            records[split.name] = record
        return Indexed(task, listing.checksum, records)

    def index(self, task: Task, advance: Callable[[int], Any], threads: int | None = None) -> None:
        """List a shard and make its tokens, where they are not there; then its copy is not needed any more.

        Args:
            advance: is called with 1 after each document that is read.
        """
        listing = list_shard(task.source, task.shard, self.cache)
        if self.find(task, listing) is None:
            tokenize_shard(listing, task.split, self.cache, self.fingerprint, self.modalities, advance, threads)
        task.shard.release(self.cache)


class _Report:
    """How far indexing is: as a bar, and for processes that wait.

    Args:
        total: shards.
    """

    def __init__(self, total: int, waiting: Waiting) -> None:
        self.bar = tqdm.tqdm(total=total, desc="indexing", unit="shard", disable=None, leave=False)
        self.waiting, self.total = waiting, total
        self.shards = self.documents = 0
        self._begun = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the begin."""
        return time.monotonic() - self._begun

    @property
    def seconds_left(self) -> float:
        """Until the end, if the rest goes like what is done; 0 while nothing is."""
        return self.seconds / max(self.shards, 1) * (self.total - self.shards) if self.shards else 0.0

    def show(self, shards: int, documents: int) -> None:
        """So many have been done."""
        self.bar.update(shards - self.shards)
        self.shards, self.documents = shards, documents
        self.bar.set_postfix_str(f"{documents:,} documents, {documents / self.seconds:,.0f} a second", refresh=False)
        left = f", about {self.seconds_left / 60:,.0f} minutes left" if shards else ""
        self.waiting.tell(f"{shards:,} of {self.total:,} shards, {documents:,} documents read{left}")

    def advance(self, documents: int) -> None:
        """So many documents more."""
        self.documents += documents
        if self.documents % 100 == 0:
            self.show(self.shards, self.documents)


def index_all(
    indexer: Indexer, tasks: Sequence[Task], workers: int | None, log: Callable[[str], None], waiting: Waiting
) -> None:
    """Index shards. Begins in this process, and goes on in several where it takes long.

    Args:
        workers: processes at most; None: one a core.
        log: is told what is being done.
        waiting: is told how far it is, for other processes.
    Raises:
        DataError: a shard cannot be read, or a process has died.
    """
    if not tasks:
        return
    workers = min(workers or _cores(), len(tasks))
    log(f"indexing {len(tasks):,} shards into {indexer.cache}")
    report = _Report(len(tasks), waiting)
    with report.bar:
        for done, task in enumerate(tasks):
            if workers > 1 and report.seconds_left > PATIENCE:
                before = report.documents
                for shards, documents in index_in_processes(indexer, tasks[done:], workers):
                    report.show(done + shards, before + documents)
                return
            indexer.index(task, report.advance)
            report.show(done + 1, report.documents)


Reply = int | Exception | None
"""What a process says: so many documents have been read, an error, or that a shard is done."""


def index_in_processes(indexer: Indexer, tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, int]]:
    """Index `tasks` in processes; yields now and then how many are done, and how many documents have been read."""
    todo = iter(tasks)
    replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    processes = [_start() for _ in range(workers)]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for process in processes:
                pool.submit(_feed, process, indexer, todo, replies)
            done = documents = 0
            while done < len(tasks):
                reply = replies.get()
                if isinstance(reply, Exception):
                    raise reply
                done, documents = done + (reply is None), documents + (reply or 0)
                yield done, documents
        finally:
            for process in processes:
                process.kill()


def _start() -> subprocess.Popen[bytes]:
    """A process that runs `serve`. Unlike those of multiprocessing it does not run the main module again, which may be
    anybody's script."""
    words = [sys.executable, "-c", "from pretrain.data.workers import serve; serve()"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    return subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _feed(
    process: subprocess.Popen[bytes], indexer: Indexer, tasks: Iterator[Task], replies: queue.SimpleQueue[Reply]
) -> None:
    """Give a process one task after the other; `replies` gets numbers of documents read, None after each task, or what
    went wrong."""
    assert process.stdin is not None and process.stdout is not None
    try:
        pickle.dump(indexer, process.stdin)
        for task in tasks:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            while (reply := pickle.load(process.stdout)) is not None:
                replies.put(reply)
            replies.put(None)
        process.stdin.close()
    except (EOFError, OSError):
        replies.put(
            DataError(
                "data.workers: a process that tokenises has ended, perhaps because the memory did not suffice, or for "
                "the reason above; set data.workers to less, and give the same command again: it goes on with the "
                "shards that are missing"
            )
        )
    except Exception as error:
        replies.put(error)


def serve() -> None:
    """Index the shards that come pickled through the standard input, until it ends; see `_feed`."""
    import torch

    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no reply

    def reply(value: Reply) -> None:
        pickle.dump(value, replies)
        replies.flush()

    indexer = pickle.load(sys.stdin.buffer)
    while True:
        try:
            task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            indexer.index(task, reply, threads=1)
            reply(None)
        except Exception as error:
            reply(error)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
