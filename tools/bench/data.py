"""The data path: what a start, a rank and a change of epoch cost by the number of documents, rows a second, tokenising.

Documents at scale are synthetic: lengths of interleaved pages (log-normal, median 250 tokens), whose tokens are a file
with a hole. Everything else is what a run does.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pretrain.data.documents import Documents
from pretrain.data.index import OpenShards, TokenRecord
from pretrain.data.packing import TokenStream
from tools.bench.benchmark import HIGHER, LOWER, Group, Settings, TableRow, benchmark
from zoo.modalities import Vocabulary

LENGTH = 1024
SHARD = 100_000
"""Documents of a synthetic shard."""
DEMAND = 50.0
"""Rows of 1,024 tokens a second that one rank takes at most: a model of 1.4 B parameters at 40 % of an H100's 989
TFLOP/s in bf16 (6 FLOPs a parameter and token) needs 46."""


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one process that opens a stream measures."""

    pieces: int
    rows: int
    padding: float
    start: float
    """Seconds until the stream is there; the first process of a machine makes the plan."""
    first_row: float
    """Seconds until a row of epoch 0 is there: the deal of an epoch, made by the first process."""
    epoch_change: float
    """Seconds of the first row of the next epoch."""
    rows_per_second: float
    anonymous: int
    """Bytes that the process holds alone when it has read rows of two epochs, beyond what it held before."""
    mapped: int
    """Bytes of files that have come into its memory, which processes share."""


def synthetic(folder: Path, documents: int) -> list[TokenRecord]:
    """Write the tokens of so many documents, shard by shard."""
    records = []
    for number, start in enumerate(range(0, documents, SHARD)):
        count = min(SHARD, documents - start)
        random = np.random.default_rng(number)
        lengths = np.minimum(random.lognormal(np.log(250), 1.0, count).astype(np.int64) + 2, 20 * LENGTH)
        place = folder / f"{number}.tokens"
        place.mkdir()
        np.concatenate([[0], np.cumsum(lengths)]).tofile(place / "starts")
        total = int(lengths.sum())
        for name, size in {"tokens": 4 * total, "text_bytes": 8 * count, "image.items": 0}.items():
            with open(place / name, "wb") as file:
                file.truncate(size)
        counts = {"text": total, "image": 0}
        records.append(TokenRecord(place, place.name, count, total, counts, {}, 0, ""))
    return records


def open_synthetic(folder: Path, records: list[TokenRecord]) -> TokenStream:
    """The stream of a run over them."""
    sizes = np.array([(record.tokens, record.documents) for record in records], np.int64)
    documents = Documents.of(OpenShards(records, {}), sizes, Vocabulary({"text": 256, "image": 16}), {}, "bench")
    return TokenStream(documents, LENGTH, 0, folder)


def measure_rank(folder: str) -> None:
    """Open the stream in `folder` as a rank does, and print what it took."""
    lines = (Path(folder) / "records.jsonl").read_text().splitlines()
    records = [
        TokenRecord(**json.loads(line) | {"folder": Path(folder, str(n) + ".tokens")}) for n, line in enumerate(lines)
    ]
    before, begun = _memory(), time.perf_counter()
    stream = open_synthetic(Path(folder), records)
    start = time.perf_counter() - begun
    first_row = _seconds(stream, 0)
    change = _seconds(stream, stream.rows_per_epoch)
    numbers = np.random.default_rng(0).integers(0, stream.rows_per_epoch, 300)
    begun = time.perf_counter()
    for number in numbers.tolist():
        stream.row(number)
    rate = len(numbers) / (time.perf_counter() - begun)
    memory = _memory()
    figures = Figures(
        len(stream.plan.pieces),
        stream.rows_per_epoch,
        stream.share_of_padding,
        start,
        first_row,
        change,
        rate,
        memory["Anonymous"] - before["Anonymous"],
        memory["Rss"] - memory["Anonymous"] - before["Rss"] + before["Anonymous"],
    )
    print(json.dumps(dataclasses.asdict(figures)))


def measure_scale(documents: int) -> tuple[Figures, Figures]:
    """The figures of the first process that opens so many documents on a machine, and of another."""
    with tempfile.TemporaryDirectory() as folder:
        records = synthetic(Path(folder), documents)
        lines = [json.dumps(dataclasses.asdict(record) | {"folder": ""}) for record in records]
        (Path(folder) / "records.jsonl").write_text("\n".join(lines))
        words = [sys.executable, "-c", f"from tools.bench.data import measure_rank; measure_rank({folder!r})"]
        first, second = (
            Figures(**json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)) for _ in range(2)
        )
    return first, second


def _seconds(stream: TokenStream, row: int) -> float:
    begun = time.perf_counter()
    stream.row(row)
    return time.perf_counter() - begun


def _memory() -> dict[str, int]:
    """Bytes of this process's memory by kind, as Linux says."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}


@benchmark("data.scale.10k", documents=10_000)
@benchmark("data.scale.1m", documents=1_000_000)
@benchmark("data.scale.100m", documents=100_000_000)
def scale(settings: Settings, documents: int) -> Group:
    """Start-up, memory of a rank and change of epoch with so many synthetic documents; see tools/bench/data.py."""
    count = min(documents, 10_000) if settings.quick else documents
    first, other = measure_scale(count)
    note = f"{count:,} documents, {first.pieces:,} pieces"

    def row(name: str, ours: float, others: float, ratio: float, target: float, better: str = LOWER) -> TableRow:
        return TableRow(name, "start", ours, others, ratio, better, target, None, note=note)

    return Group(
        figures=[
            row(
                "start, first process and the next, ms; the next over the first",
                1e3 * first.start,
                1e3 * other.start,
                other.start / first.start,
                1.0,
            ),
            row(
                "change of epoch, first process and the next, ms; seconds",
                1e3 * first.epoch_change,
                1e3 * other.epoch_change,
                first.epoch_change,
                60.0,
            ),
            row("bytes a document that a rank holds alone", 0.0, 0.0, other.anonymous / count, 20.0),
            row("bytes a document that ranks share", 0.0, 0.0, other.mapped / count, 40.0),
            row("rows a second over the demand of a rank", 0.0, 0.0, other.rows_per_second / DEMAND, 5.0, HIGHER),
            row("share of padding", 0.0, 0.0, first.padding, 0.03),
        ]
    )
