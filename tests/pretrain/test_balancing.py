"""Balanced and fitted routers in whole runs: the same on one rank and two, and after a stop as without one."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import LAYER, assert_same_metrics, one_rendezvous, steady, tiny_recipe
from tests.pretrain.test_two_ranks import train

STEPS = 6
SPARSE = {"type": "moma", "experts": {"text": 3, "image": 4}, "d_ff": 16, "shared_experts": 1}
BIAS = SPARSE | {"router": {"type": "token_choice", "score": "sigmoid", "balance": {"type": "bias", "rate": 0.01}}}
FITTED = SPARSE | {"router": {"type": "mixer", "refit_every": 2, "context": "document"}}
LOSS = {"type": "experts", "experts": 4, "d_ff": 16, "noop_experts": 1, "router": {"type": "token_choice"}}
ANYWHERE = [LAYER | {"feedforward": part} for part in (BIAS, FITTED)]
"""Layers for which the split into ranks and micro-batches does not matter."""


def recipe(data: Path, run: Path, layers: list[dict[str, Any]], stage: int, precision: str, steps: int = STEPS) -> dict:
    changes: dict[str, Any] = {"model": {"layers": layers}, "data": {"validation": None}}
    changes |= {"train": {"steps": steps, "precision": precision}}
    return tiny_recipe(data, run, **changes, deepspeed={"zero_optimization": {"stage": stage}})


def runs(data: Path, folder: Path, mixed: bool) -> None:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        train(folder, recipe(data, folder / "anywhere", ANYWHERE, 2, "fp32"))
        layers = [*ANYWHERE, LAYER | {"feedforward": LOSS}]
        for name, steps in (("whole", STEPS), ("stopped", 3), ("stopped", STEPS)) if mixed else ():
            train(folder, recipe(data, folder / name, layers, 3, "bf16", steps))


@pytest.fixture(scope="module")
def folders(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run folders of one rank and of two."""
    found = {}
    for ranks in (1, 2):
        folder = found[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        arguments = {"data": digit_shards, "folder": folder, "mixed": ranks == 2}
        run_ranks("tests.pretrain.test_balancing:runs", ranks, folder / "scratch", **arguments)
    return found


def test_two_ranks_update_what_one_updates(folders: dict[int, Path]) -> None:
    one, two = (steady(folders[ranks] / "anywhere") for ranks in (1, 2))
    for ours, theirs in zip(two, one, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4), ours["step"]
    first, second = (load_file(next((folders[ranks] / "anywhere").glob("**/*.safetensors"))) for ranks in (1, 2))
    ticks = [name for name in first if name.endswith("ticks")]
    assert len(ticks) == 2 and all(first[name].any() and first[name].equal(second[name]) for name in ticks)
    assert [int(value) for name, value in second.items() if name.endswith("refits")] == [STEPS // 2] * 2


def test_a_stopped_run_goes_on_bit_for_bit(folders: dict[int, Path]) -> None:
    assert_same_metrics(folders[2] / "stopped", folders[2] / "whole")


def test_the_metrics_tell_balance(folders: dict[int, Path]) -> None:
    last = steady(folders[2] / "whole")[-1]
    assert 0.009 < last["balance/loss"] < 0.02
    prefix = "load/layers.2.feedforward.groups.all"
    shares = [last[f"{prefix}/{expert}"] for expert in range(5)]
    assert sum(shares) == pytest.approx(1) and last[f"{prefix}/imbalance"] == pytest.approx(5 * max(shares))
    assert "load/layers.1.feedforward.groups.image/imbalance" in last and "auxiliary/loss" not in last
