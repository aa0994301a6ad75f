"""`python -m tools.sweep`, `type: pretrain`: real trainings, killed and resumed, upcycled, and their report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain import metrics
from tests.pretrain.runs import ROOT, UNSTEADY, environment
from tests.tools.sweep.pretrain.sweeps import MOMA, write_sweep


def sweep(path: Path, out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tools.sweep", str(path), str(out), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=3000)
    assert process.returncode == 0, said
    return said


def lines(run: Path) -> list[dict[str, Any]]:
    """What a run reported, but for what the clock says."""
    return [{k: v for k, v in item.items() if k not in UNSTEADY} for item in metrics.read(run / "metrics.jsonl")]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_sweep_that_is_killed_goes_on(digit_shards: Path, tmp_path: Path) -> None:
    """The whole, and one that is killed in the middle: the same numbers, nothing finished done anew, one report."""
    train = {"steps": 30, "evaluate_every": 10, "checkpoint_every": 2}
    path = write_sweep(tmp_path, digit_shards, over={"train": train}, jobs=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert "Must match dense" in finish(sweep(path, whole))
    process = sweep(path, cut)
    dense, moma = (cut / "runs" / f"{arm}-one-0" for arm in ("dense", "moma"))
    until = time.monotonic() + 2000
    while not list((moma / "trained").glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = (dense / "result.json").stat().st_mtime_ns
    assert not (moma / "result.json").exists()
    finish(sweep(path, cut))
    assert (dense / "result.json").stat().st_mtime_ns == kept
    assert "resuming" in (moma / "log").read_text()
    for arm in ("dense", "moma"):
        runs = [folder / "runs" / f"{arm}-one-0" for folder in (whole, cut)]
        assert lines(runs[0] / "trained") == lines(runs[1] / "trained")
        assert not (runs[1] / "trained" / "checkpoints").exists()
    text = (cut / "report.md").read_text()
    assert "| moma | one | all | " in text and "Not finished" not in text and (cut / "report.html").exists()
    finish(sweep(path, cut, "--report"))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_stages(digit_shards: Path, tmp_path: Path) -> None:
    """Upcycled, and causal routers trained afterwards; both are one curve."""
    one = {"model": {"layers": {"feedforward": {"experts": {"text": 1, "image": 1}}}}}
    blind = {"model": {"layers": {"feedforward": {**MOMA["model"]["layers"]["feedforward"], "auxiliary": False}}}}
    arms = {
        "moma": {"over": MOMA},
        "upcycled": {"over": MOMA, "begin": {"share": 0.5, "over": one}},
        "afterwards": {"over": blind, "routers": {"train": {"steps": 2, "evaluate_every": 1}}},
    }
    path, out = write_sweep(tmp_path, digit_shards, arms=arms, jobs=2), tmp_path / "out"
    finish(sweep(path, out))
    found = {arm: json.loads((out / "runs" / f"{arm}-one-0" / "result.json").read_text()) for arm in arms}
    assert len({each["data"] for each in found.values()}) == 1
    assert "eval/causal/loss" in found["afterwards"]["last"]
    text = (out / "report.md").read_text()
    assert "| upcycled | one | all | " in text and "| afterwards | one | " in text
    assert not os.path.exists(out / "runs" / "upcycled-one-0" / "upcycled" / "model.safetensors")
