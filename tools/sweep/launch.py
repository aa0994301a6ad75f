"""Runs of a sweep, each in a process of its own, some side by side."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tqdm

from tools.sweep.folder import RESULT
from tools.sweep.kind import Sweep
from zoo.config import UserError

LOG = "log"
TAIL = 12
"""Lines of a failed run's log that are shown."""
TRIES = 2
"""How often a run is begun, or gone on with, before it counts as failed."""
PATIENCE = 60.0
"""Seconds that a training has to leave a checkpoint."""
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells its processes; each run of a sweep is a launch of its own."""


def launch(
    sweep: Sweep[Any], folders: Sequence[Path], jobs: int, finished: Callable[[Path], None] = lambda folder: None
) -> list[Path]:
    """Do runs, `jobs` at a time, showing progress and time left; returns those that failed TRIES times.

    Args:
        folders: of the runs, as `folder.prepare` left them; they are begun in this order.
        finished: is told the folder of each run that has succeeded, as soon as it has.
    """
    environment = _environment(jobs)
    waiting, running, failed = list(folders), {}, []
    tries: Counter[Path] = Counter()
    with tqdm.tqdm(total=len(folders), desc="runs", unit="run", smoothing=0, disable=not folders or None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    folder = waiting.pop(0)
                    tries[folder] += 1
                    running[_start(command(sweep, folder), folder / LOG, environment)] = folder
                done = [process for process in running if process.poll() is not None]
                for process in done:
                    folder = running.pop(process)
                    if process.returncode == 0 and (folder / RESULT).exists():
                        finished(folder)
                        bar.write(f"{folder.name}: {sweep.summary(json.loads((folder / RESULT).read_text()))}")
                    elif tries[folder] < TRIES:
                        bar.write(f"{folder.name} failed, and is tried once more", sys.stderr)
                        waiting.append(folder)
                        continue
                    else:
                        failed.append(folder)
                        bar.write(f"{folder.name} failed:\n  " + "\n  ".join(_tail(folder / LOG)), sys.stderr)
                    bar.update()
                bar.set_postfix_str(", ".join(folder.name for folder in running.values()))
                if not done:
                    time.sleep(0.2)
        finally:
            for process in running:
                os.killpg(process.pid, signal.SIGTERM)
            for process in running:
                process.wait()
    return failed


def command(sweep: Sweep[Any], folder: Path) -> list[str]:
    """What does one run; the same again goes on with it."""
    return [sys.executable, "-m", "tools.sweep.run", sweep.type, str(folder)]


def attended(words: Sequence[str], of_a_sweep: bool) -> int:
    """Run a command to its end; returns its exit code. It and all that it has started get TERM where this process is
    told to end, and are waited for: a launcher may end before its ranks do.

    Args:
        of_a_sweep: this process was started by a sweep, and the command ends with it.
    Raises:
        UserError: the sweep was killed; its next call goes on from a checkpoint.
    """
    sweep = os.getppid()
    process = subprocess.Popen(words, process_group=0)
    try:
        while process.poll() is None:
            if of_a_sweep and os.getppid() != sweep:
                raise UserError("the sweep is gone")
            time.sleep(0.2)
    finally:
        if process.poll() is None:
            _end(process)
    return process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """Tell a process group to end, and wait for it; KILL those that have not after PATIENCE seconds."""
    os.killpg(process.pid, signal.SIGTERM)
    process.wait()
    for number in [0] * int(PATIENCE / 0.2) + [signal.SIGKILL]:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(0.2)


def _environment(jobs: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in RANKS}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    return environment


def _start(words: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(words, env=environment, stdout=file, stderr=file, process_group=0)


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL:]
