"""Runs of a sweep, each in a process of its own, some side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tqdm

from tools.adapt_sweep.metrics import Metric
from tools.adapt_sweep.point import RESULT

LOG = "log"
TAIL = 12
"""Lines of a failed run's log that are shown."""


def launch(folders: Sequence[Path], jobs: int, metric: Metric) -> list[Path]:
    """Do runs, `jobs` at a time, showing progress and time left; returns those that failed."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if jobs > 1 else dict(os.environ)
    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):  # each run is the only rank of its own
        environment.pop(name, None)
    waiting, running, failed = list(folders), {}, []
    with tqdm.tqdm(total=len(folders), desc="runs", unit="run", smoothing=0, disable=not folders or None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    running[_start(folder, environment)] = folder
                done = [process for process in running if process.poll() is not None]
                for process in done:
                    folder = running.pop(process)
                    bar.update()
                    if process.returncode or not (folder / RESULT).exists():
                        failed.append(folder)
                        lines = (folder / LOG).read_text(errors="replace").splitlines()[-TAIL:]
                        bar.write(f"{folder.name} failed:\n  " + "\n  ".join(lines), sys.stderr)
                    else:
                        bar.write(f"{folder.name}: {_said(folder, metric)}")
                bar.set_postfix_str(", ".join(folder.name for folder in running.values()))
                if not done:
                    time.sleep(0.2)
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGTERM)
            for process in running:
                process.wait()
    return failed


def _start(folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tools.adapt_sweep.point", str(folder)],
            env=environment,
            stdout=log,
            stderr=log,
            process_group=0,
        )


def _said(folder: Path, metric: Metric) -> str:
    result = json.loads((folder / RESULT).read_text())
    before, after = (metric.show([metric.of(result[when])]) for when in ("before", "after"))
    return f"{metric.name} {before} → {after} at {result['after']['flops']:.3f} of dense FLOPs"
