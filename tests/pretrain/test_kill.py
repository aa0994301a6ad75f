"""Runs that are killed at any moment, restarted by the same command, and end as if nothing had happened. Slow.

Checkpoints are written in the background in every other case, and never in the run that is not killed. Each case: a run
to the end; then the same run, whose processes (all ranks) get SIGKILL again and again and which is
then left to finish. Its metrics must equal the first run's bit for bit. Half of the kills wait until a checkpoint is
being written. A table of the kills is printed (`pytest -m slow -s tests/pretrain/test_kill.py`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain import metrics
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.runs import (
    Processes,
    assert_same_metrics,
    assert_tensorboard_agrees,
    launch,
    start,
    steady,
    write_recipe,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 30
CASES = [
    (precision, stage, ranks)
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 2, 3)))
    for stage in stages
    for ranks in (1, 2)
]
KILLS = 2


def changes(precision: str, stage: int, **train: Any) -> dict[str, Any]:
    every = {"evaluate_every": 7, "checkpoint_every": 4}
    return {
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "precision": precision, **every, **train},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }


@pytest.fixture(scope="module")
def table() -> Iterator[list[str]]:
    """Takes a line a kill; printed at the end."""
    lines: list[str] = []
    yield lines
    print(f"\n{len(lines)} kills\n" + "\n".join(lines))


@pytest.mark.parametrize(("precision", "stage", "ranks"), CASES)
def test_killed_runs_end_like_whole_ones(
    digit_shards: Path, tmp_path: Path, table: list[str], precision: str, stage: int, ranks: int
) -> None:
    dice = random.Random(f"{precision} {stage} {ranks}")
    whole = write_recipe(tmp_path / "a", digit_shards, tmp_path / "whole", **changes(precision, stage))
    background = CASES.index((precision, stage, ranks)) // 2 % 2 == 0
    changed = changes(precision, stage, checkpoint_in_background=background)
    killed = write_recipe(tmp_path / "b", digit_shards, tmp_path / "killed", **changed)
    baseline = start([whole], tmp_path / "whole.txt", ranks)
    assert baseline.wait(300) == [0] * ranks, baseline.printed()

    run = tmp_path / "killed"
    for number in range(KILLS):
        while_saving = (number + CASES.index((precision, stage, ranks))) % 2 == 0
        from_step = dice.randrange(1, STEPS * (number + 1) // (KILLS + 1))
        processes = start([killed], tmp_path / "killed.txt", ranks)
        moment = kill(processes, run, from_step, while_saving, dice)
        table.append(f"{precision}  ZeRO-{stage}  {ranks} rank(s)  {moment}  {left(run)}")
    last = start([killed], tmp_path / "killed.txt", ranks)
    assert last.wait(300) == [0] * ranks, last.printed()
    assert_same_metrics(run, tmp_path / "whole")
    assert_tensorboard_agrees(run)
    assert not [p.name for p in (run / "checkpoints").iterdir() if p.suffix in (".tmp", ".old")]


def kill(processes: Processes, run: Path, from_step: int, while_saving: bool, dice: random.Random) -> str:
    """SIGKILL to every rank at a random moment once `from_step` is logged; returns a word on it."""

    def logged() -> int:
        file = run / "metrics.jsonl"
        items = metrics.read(file) if file.exists() else []
        return items[-1]["step"] if items else 0

    def saving() -> bool:
        return any(p.is_dir() and p.suffix == ".tmp" for p in (run / "checkpoints").glob("step-*"))

    assert processes.wait_until(lambda: logged() >= from_step, 300), processes.printed()
    if while_saving:
        assert processes.wait_until(saving, 300), processes.printed()
        time.sleep(dice.choice((0.0, 0.0, 0.01, 0.03)))
    else:
        time.sleep(dice.uniform(0.0, 0.2))
    assert processes.running(), "the run ended before it could be killed"
    processes.kill()
    return f"after step {logged():>2} {'while saving' if while_saving else 'at random   '}"


def test_a_mixture_under_the_launcher(tmp_path: Path, table: list[str]) -> None:
    """Two sources whose weights a ratio of tokens has moved, on two ranks of `deepspeed`, killed and resumed."""
    (tmp_path / "words").mkdir()
    (tmp_path / "pictures").mkdir()
    texts = [sample(f"w{n:03}", "a word " * (n % 7 + 1)) for n in range(60)]
    shown = [sample(f"p{n:03}", png(n), f"{n}", png(n + 500)) for n in range(60)]
    write_shard(tmp_path / "words" / "0.tar", texts)
    write_shard(tmp_path / "pictures" / "0.tar", shown)
    data = {
        "path": str(tmp_path),
        "sources": {
            name: {"type": "documents", "path": name, "validation": 0.1, "weight": weight}
            for name, weight in (("words", 3), ("pictures", 1))
        },
        "token_ratio": {"text": 2, "image": 1},
    }
    changed = changes("fp32", 2) | {"data": data}
    recipes = {
        name: write_recipe(tmp_path / f"of {name}", "", tmp_path / name, **changed) for name in ("whole", "killed")
    }
    whole = launch([recipes["whole"]], tmp_path / "whole.txt")
    assert whole.wait(300) == [0], whole.printed()
    dice = random.Random(7)
    for from_step in (6, 17):
        processes = launch([recipes["killed"]], tmp_path / "killed.txt")
        moment = kill(processes, tmp_path / "killed", from_step, from_step == 17, dice)
        table.append(f"a mixture  2 ranks of deepspeed  {moment}  {left(tmp_path / 'killed')}")
    last = launch([recipes["killed"]], tmp_path / "killed.txt")
    assert last.wait(300) == [0], last.printed()
    assert_same_metrics(tmp_path / "killed", tmp_path / "whole")

    steps = [item for item in steady(tmp_path / "killed") if "loss" in item]
    assert "data.token_ratio: " in (tmp_path / "whole.txt").read_text()
    for name in ("words", "pictures"):
        epochs = [item[f"data/epochs/{name}"] for item in steps]
        assert epochs == sorted(epochs) and epochs[-1] > 1
        assert any(f"data/loss/{name}" in item for item in steps)
    image = sum(item["data/share/image"] for item in steps) / len(steps)
    assert image == pytest.approx(1 / 3, abs=0.05)


def left(run: Path) -> str:
    return "left: " + " ".join(sorted(p.name for p in (run / "checkpoints").iterdir()))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_then_one_then_two(digit_shards: Path, tmp_path: Path, stage: int) -> None:
    """A third of the way each, through universal checkpoints, in other micro-batches; every choice of tokens is a row's
    own."""
    from tests.pretrain.runs import EXPERTS, LAYER

    by_row = LAYER | {"feedforward": EXPERTS | {"scope": "row"}}
    model = {"layers": [by_row, by_row | {"depth": {"type": "mod", "capacity": 0.5, "scope": "row"}}]}
    changed = changes("fp32", stage, checkpoint_every=0, steps=12) | {"model": model}
    whole = write_recipe(tmp_path / "a", digit_shards, tmp_path / "whole", **changed)
    moved = write_recipe(tmp_path / "b", digit_shards, tmp_path / "moved", **changed)
    baseline = start([whole], tmp_path / "whole.txt", 2)
    assert baseline.wait(300) == [0, 0], baseline.printed()
    for ranks, steps, micro_batch in ((2, 4, 2), (1, 8, 4), (2, 12, 1)):
        words = [moved, f"train.steps={steps}", f"train.micro_batch={micro_batch}"]
        processes = start(words, tmp_path / "moved.txt", ranks)
        assert processes.wait(300) == [0] * ranks, processes.printed()
    items = [[item for item in steady(tmp_path / name) if "loss" in item] for name in ("moved", "whole")]
    assert [item["step"] for item in items[0]] == list(range(1, 13))
    for mine, other in zip(*items, strict=True):
        for key in mine:
            if key.startswith("loss"):
                assert mine[key] == pytest.approx(other[key], rel=1e-6, abs=1e-6), (mine["step"], key)
        assert mine["tokens"] == other["tokens"]
