"""All documents of a source as shards, in one process or several."""

from __future__ import annotations

import concurrent.futures
import contextlib
import heapq
import json
import multiprocessing
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock
import tqdm

from pretrain.data.cache import room_for
from pretrain.data.errors import DataError
from pretrain.data.sources import SourceConfig
from tools.make_shards.measure import Measure, Summary
from tools.make_shards.sheet import ROWS, Drawn, draw_sheet
from tools.make_shards.writing import Job, Joined, Piece, Worker, Written, pieces
from zoo.config import UserError
from zoo.files import atomic_path, remove_leftovers


def make_shards(
    config: SourceConfig, out: Path, measure: Measure, hold_out: float = 0.01, megabytes: int = 256, workers: int = 1
) -> Summary:
    """Write the folder `out`.

    Args:
        hold_out: share of the documents that are held out.
        megabytes: of a shard, about, in millions of bytes.
        workers: processes.
    Raises:
        UserError: `out` is not empty or somebody is writing it, the source cannot be read, nothing of it can be used,
            or the disk is full. Nothing of `out` is there then, and nothing after a kill.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; give another folder, or remove it")
    source = config.block(config)
    shards = source.shards()
    with _alone(out), room_for(out.parent, "OUT"), atomic_path(out) as folder:
        cache = folder / "cache"  # of copies of what is remote
        cache.mkdir(parents=True)
        job = Job(source, shards, folder, hold_out, measure)
        joined = {split: Joined(folder, split, megabytes * 10**6) for split in ("train", "val")}
        total, lowest = Summary(), list[Drawn]()
        todo = pieces(shards)
        with tqdm.tqdm(total=len(todo), desc="writing", unit="piece", disable=None, leave=False) as bar:
            for written in _written(job, cache, todo, workers):
                for split, piece in written.files.items():
                    joined[split].add(piece)
                total.add(written.summary)
                lowest = heapq.nsmallest(ROWS, [*lowest, *written.drawn], key=lambda each: each.place)
                bar.update()
                bar.set_postfix_str(f"{sum(total.of('documents').values()):,} documents", refresh=False)
        for each in joined.values():
            each.close()
        if not total.of("documents"):
            raise DataError("none of the documents can be used:\n  " + "\n  ".join(total.lines()))
        shutil.rmtree(cache)
        draw_sheet(lowest, folder / "contact_sheet.png")
        (folder / "summary.json").write_text(json.dumps(total.dump(), indent=1, ensure_ascii=False) + "\n")
    return total


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let one process at a time write `out`, and remove what a killed one has left."""
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"{out}: another process is writing it; wait for it, or give another folder") from None
    try:
        remove_leftovers(out.parent, re.escape(out.name))
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _written(job: Job, cache: Path, todo: Sequence[Piece], workers: int) -> Iterator[Written]:
    """What became of each piece, in order."""
    if min(workers, len(todo)) <= 1:
        worker = Worker(job, cache)
        yield from map(worker.write, todo)
        worker.close()
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy locks that threads of this process hold
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(todo)), context, _begin, (job, cache)) as pool:
        try:
            yield from pool.map(_write, todo)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker: Worker


def _begin(job: Job, cache: Path) -> None:
    """What a process has from its begin on."""
    global _worker
    _worker = Worker(job, cache)


def _write(piece: Piece) -> Written:
    return _worker.write(piece)
