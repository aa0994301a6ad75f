"""What ends a run early: signals, a launcher that has gone, a rank that has died. Whole runs are slow."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pretrain import metrics, run_folder
from pretrain.watch import LOST
from tests.pretrain.runs import ROOT, Processes, assert_same_metrics, environment, launch, write_recipe

WATCHED = """
import os, pathlib, socket, sys, time
import psutil
from pretrain import watch
from pretrain.process_group import Ranks

class Two(Ranks):
    def gather(self, value):
        child = psutil.Process(int(sys.argv[1]))
        return [value, watch._Peer(1, socket.gethostname(), child.pid, child.create_time())]

watch.EVERY = 0.05
with watch.Watch(Two(0, 2), pathlib.Path(sys.argv[2])) as seen:
    print("ready", flush=True)
    {body}
"""
WAIT = "time.sleep(60)"
BREAK = 'sys.stdin.readline(); raise RuntimeError("connection closed by peer")'
SIGNALS = "[time.sleep(0.05) for _ in iter(lambda: seen.told_to_stop, True)]; print('told'); sys.stdin.readline()"


def watched(folder: Path, body: str) -> tuple[subprocess.Popen[str], subprocess.Popen[bytes]]:
    """A process that runs `body` in a watch, and another that it takes for rank 1."""
    other = subprocess.Popen(["sleep", "60"])
    command = [sys.executable, "-c", WATCHED.format(body=body), str(other.pid), str(folder)]
    pipe = subprocess.PIPE
    mine = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(), cwd=ROOT)
    assert mine.stdout is not None and mine.stdout.readline() == "ready\n"
    return mine, other


@pytest.mark.parametrize("body", [WAIT, BREAK])
def test_a_rank_that_dies_is_named(tmp_path: Path, body: str) -> None:
    """Whether this rank waits for it for ever, or its connection breaks off."""
    mine, other = watched(tmp_path, body)
    other.kill()  # and not waited for: a process that nobody has asked for its code is dead all the same
    printed, said = mine.communicate("\n", timeout=30)
    other.wait()
    assert (mine.returncode, printed) == (1, "")
    assert re.fullmatch(rf"error: rank 1 \(process {other.pid} on \S+\) has ended before the run: .*\n", said), said
    assert (tmp_path / LOST).exists()


def test_only_one_rank_says_so(tmp_path: Path) -> None:
    (tmp_path / LOST).touch()
    mine, other = watched(tmp_path, WAIT)
    other.kill()
    assert mine.communicate(timeout=30) == ("", "") and mine.returncode == 1
    other.wait()
    run_folder.claim(tmp_path).close()
    assert not (tmp_path / LOST).exists(), "the next start begins anew"


def test_ctrl_c_twice(tmp_path: Path) -> None:
    mine, other = watched(tmp_path, SIGNALS)
    mine.send_signal(signal.SIGINT)
    assert mine.stdout is not None and mine.stdout.readline() == "told\n"
    mine.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in mine.communicate(timeout=30)[1]
    other.kill()
    other.wait()


# --------------------------------------------------------------------------------------------- whole runs on two ranks


@pytest.fixture(scope="module")
def long_run(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe of a run that takes its time, and the folder for its parts."""
    folder = tmp_path_factory.mktemp("watched")
    return digit_shards, folder


def begun(long_run: tuple[Path, Path], name: str) -> tuple[Processes, Path, Path]:
    """A run under DeepSpeed's launcher that has done its fifth step; its recipe and its folder."""
    data, folder = long_run
    run = folder / name
    recipe = write_recipe(folder / f"{name}-recipe", data, run, train={"steps": 100_000})
    processes = launch([recipe], folder / f"{name}.txt")
    file = run / "metrics.jsonl"
    assert processes.wait_until(lambda: file.exists() and len(metrics.read(file)) > 5), processes.printed()
    return processes, recipe, run


def ranks_of(processes: Processes) -> list[psutil.Process]:
    """The ranks, by rank."""
    every = psutil.Process(processes.members[0].pid).children(recursive=True)
    ranks = [process for process in every if any("--local_rank" in word for word in process.cmdline())]
    return sorted(ranks, key=lambda process: process.environ()["RANK"])


def ended(run: Path) -> int:
    """The step of the newest checkpoint, which must be the last step that was logged."""
    step = int(run_folder.newest_checkpoint(run).name.removeprefix("step-"))
    assert [item["step"] for item in metrics.read(run / "metrics.jsonl")][-1] == step
    return step


@pytest.mark.slow
def test_the_launcher_alone_gets_term(long_run: tuple[Path, Path]) -> None:
    processes, recipe, run = begun(long_run, "term")
    ranks = ranks_of(processes)
    os.kill(processes.members[0].pid, signal.SIGTERM)  # the command that was given; its children hear nothing
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, processes.printed()
    step = ended(run)
    again = launch([recipe, f"train.steps={step + 2}"], run.with_suffix(".txt"))
    assert again.wait() == [0], again.printed()
    data, folder = long_run
    whole = write_recipe(folder / "whole-recipe", data, folder / "whole", train={"steps": step + 2})
    straight = launch([whole], folder / "whole.txt")
    assert straight.wait() == [0], straight.printed()
    assert_same_metrics(run, folder / "whole")


@pytest.mark.slow
def test_ctrl_c_saves(long_run: tuple[Path, Path]) -> None:
    processes, _, run = begun(long_run, "interrupted")
    ranks = ranks_of(processes)
    os.killpg(processes.members[0].pid, signal.SIGINT)  # as a terminal does
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive, processes.printed()
    ended(run)
    assert "told to stop: leaving after step" in processes.printed()
    assert "pretrain/" not in processes.printed().partition("told to stop")[2], "no traceback of ours"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_in_one_line(long_run: tuple[Path, Path], victim: int) -> None:
    processes, _, run = begun(long_run, f"killed-{victim}")
    ranks = ranks_of(processes)
    ranks[victim].kill()
    processes.wait(60)
    printed = processes.printed()
    errors = [line for line in printed.splitlines() if "error: " in line]
    assert len(errors) == 1 and errors[0].startswith(f"error: rank {victim} (process {ranks[victim].pid} on "), printed
    assert "Traceback" not in printed
