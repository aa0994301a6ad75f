"""The data path at scale: what a start, a rank and a change of epoch cost by the number of documents.

Documents are synthetic: lengths of interleaved pages (log-normal, median 250 tokens), whose tokens are a file with a
hole. Everything else is what a run does.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.documents import Documents
from pretrain.data.index import OpenShards, TokenRecord
from pretrain.data.packing import TokenStream
from tools.bench.benchmark import HIGHER, LOWER, Group, Settings, TableRow, benchmark
from tools.bench.measure import STEP
from zoo.modalities import Vocabulary

LENGTH = 1024
SHARD = 100_000
"""Documents of a synthetic shard."""
DEMAND = 50.0
"""Rows of 1,024 tokens a second that one rank takes at most: a model of 1.4 B parameters at 40 % of an H100's 989
TFLOP/s in bf16 (6 FLOPs a parameter and token) needs 46."""
ROWS = 300
"""Rows that are read before any are timed, and that are timed."""
SAMPLING = 0.02
"""Seconds from one look at the memory to the next."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds of something done once, by the clock and of this process's CPU time."""

    wall: float
    cpu: float

    @classmethod
    def of(cls, work: Callable[[], Any]) -> Cost:
        """What a call costs."""
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return cls(time.perf_counter() - wall, time.process_time() - cpu)


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one process that opens a stream measures."""

    pieces: int
    padding: float
    start: Cost
    """Until the stream is there; the first process of a machine makes the plan."""
    deal: Cost
    """Until a row of epoch 0 is there: the deal of an epoch, made by the first process."""
    epoch_change: Cost
    """The first row of the next epoch."""
    row: Cost
    """A row, when the files it needs have been opened."""
    private: int
    """Bytes that the process holds alone when it has read rows of two epochs, beyond what it held before."""
    peak: int
    """The most of them that it held at any time."""
    shared: int
    """Bytes of the files of plan and epochs, which processes share."""

    @classmethod
    def parse(cls, text: str) -> Figures:
        """What `measure_rank` printed."""
        found: dict[str, Any] = json.loads(text)
        for name, value in found.items():
            found[name] = Cost(**value) if isinstance(value, dict) else value
        return cls(**found)


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
    before = private_bytes()
    with Peak() as peak:
        streams: list[TokenStream] = []
        start = Cost.of(lambda: streams.append(open_synthetic(Path(folder), records)))
        (stream,) = streams
        deal, change = (Cost.of(lambda row=row: stream.row(row)) for row in (0, stream.rows_per_epoch))
        numbers = np.random.default_rng(0).integers(0, stream.rows_per_epoch, 2 * ROWS).tolist()
        for number in numbers[:ROWS]:
            stream.row(number)
        rows = Cost.of(lambda: [stream.row(number) for number in numbers[ROWS:]])
    files = (path for path in Path(folder).glob("*.plan/*") if path.is_file())
    figures = Figures(
        len(stream.plan.pieces),
        stream.share_of_padding,
        start,
        deal,
        change,
        Cost(rows.wall / ROWS, rows.cpu / ROWS),
        private_bytes() - before,
        peak.bytes - before,
        sum(path.stat().st_size for path in files),
    )
    print(json.dumps(dataclasses.asdict(figures)))


class Peak:
    """The most memory that this process held alone while this lasted."""

    def __enter__(self) -> Peak:
        self.bytes, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(SAMPLING):
            self.bytes = max(self.bytes, private_bytes())


def private_bytes() -> int:
    """Bytes of this process's memory that are no file's, as Linux says."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "Linux has it"
    return int(found[1]) * 1024


def measure_scale(documents: int) -> tuple[Figures, Figures]:
    """The figures of the first process that opens so many documents on a machine, and of another."""
    with tempfile.TemporaryDirectory() as folder:
        records = synthetic(Path(folder), documents)
        lines = [json.dumps(dataclasses.asdict(record) | {"folder": ""}) for record in records]
        (Path(folder) / "records.jsonl").write_text("\n".join(lines))
        words = [sys.executable, "-c", f"from tools.bench.data import measure_rank; measure_rank({folder!r})"]
        first, second = (
            Figures.parse(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout) for _ in range(2)
        )
    return first, second


@benchmark("data.scale.10k", documents=10_000)
@benchmark("data.scale.1m", documents=1_000_000)
@benchmark("data.scale.10m", documents=10_000_000)
@benchmark("data.scale.100m", documents=100_000_000)
def scale(settings: Settings, documents: int) -> Group:
    """Start, memory of a rank and change of epoch with so many synthetic documents, and what they grow to from a tenth
    of them; "first" is the process that makes the plan of a machine, "next" any other. 10m takes half a minute of CPU
    time, 100m six minutes and 9 GB of disk."""
    count = min(documents, 10_000) if settings.quick else documents
    (tenth, _), (first, other) = measure_scale(count // 10), measure_scale(count)
    note = f"{count:,} documents, {first.pieces:,} pieces"

    def pair(name: str, ours: Cost, than: Cost, target: float) -> TableRow:
        cpu = f"{note}; {ours.cpu:.3g} and {than.cpu:.3g} s of CPU time"
        ratio, of_cpu = ours.wall / than.wall, ours.cpu / max(than.cpu, 1e-9)
        return TableRow(
            name, STEP, 1e3 * ours.wall, 1e3 * than.wall, ratio, LOWER, target, None, cpu_ratio=of_cpu, note=cpu
        )

    def figure(
        name: str, ratio: float, target: float | None, better: str = LOWER, aim: float | None = None
    ) -> TableRow:
        return TableRow(name, STEP, None, None, ratio, better, target, aim, note=note)

    rows = [
        pair("start of the first, over that with a tenth of the documents", first.start, tenth.start, 12.0),
        pair("start of the next, over that of the first", other.start, first.start, 1.0),
        pair("deal of an epoch by the first, over that of a tenth", first.deal, tenth.deal, 12.0),
        pair("change of epoch of the next, over that of the first", other.epoch_change, first.epoch_change, 1.0),
        figure("MB that a rank holds alone", other.private / 1e6, max(20 * count, 16e6) / 1e6),
        figure("MB that the first holds alone, at most", first.peak / 1e6, None),
        TableRow(
            "rows a second over the demand of a rank",
            STEP,
            1e3 * other.row.wall,
            1e3 / DEMAND,
            1 / other.row.wall / DEMAND,
            HIGHER,
            5.0,
            None,
            cpu_ratio=1 / other.row.cpu / DEMAND,
            note=note,
        ),
        figure("share of padding", first.padding, 0.03),
    ]
    if first.shared:
        rows.insert(6, figure("bytes a document in files that ranks share", first.shared / count, 40.0, aim=20.0))
    return Group(figures=rows)
