"""The command itself on real processes: what a run leaves behind, and stopping and resuming without a trace."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain import metrics
from pretrain import recipe as recipes
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import (
    assert_same_metrics,
    assert_tensorboard_agrees,
    launch,
    one_rendezvous,
    start,
    steady,
    tiny_recipe,
    write_recipe,
)

EVERY = {"evaluate_every": 4, "checkpoint_every": 3}
BF16 = {"precision": "bf16", "steps": 20, "checkpoint_every": 7}


# ------------------------------------------------------------------------------------------- one run, one real process


@pytest.fixture(scope="module")
def finished(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run of 12 steps on one rank, and what it printed."""
    folder = tmp_path_factory.mktemp("one")
    path = write_recipe(folder, digit_shards, folder / "run", train={**EVERY, "log_every": 2, "steps": 12})
    processes = start([path], folder / "printed")
    assert processes.wait() == [0], processes.printed()
    return folder / "run", processes.printed()


def test_metrics(finished: tuple[Path, str], digit_shards: Path) -> None:
    run, _ = finished
    items = metrics.read(run / "metrics.jsonl")
    steps = [item for item in items if "loss" in item]
    evaluations = [item for item in items if "eval/causal/loss" in item]
    assert [item["step"] for item in steps] == [2, 4, 6, 8, 10, 12]
    assert [item["step"] for item in evaluations] == [4, 8, 12]
    at = {item["step"]: item for item in steps}
    for item in evaluations:  # say how far the run was
        assert all(item[key] == at[item["step"]][key] for key in ("tokens", "flops"))
        assert item["seconds"] > at[item["step"]]["seconds"], "the step itself counts, too"
    names = {"step", "tokens", "flops", "loss", "loss/text", "loss/image", "loss/z", "lr", "grad_norm"}
    names |= {"bad_steps", "seconds", "tokens_per_second", "memory", "auxiliary/loss"}
    names |= {f"auxiliary/{rate}" for rate in ("accuracy", "precision", "recall", "always_skip")}
    assert all(set(item) == names for item in steps)
    assert all(item["loss"] != round(item["loss"], 6) for item in steps), "numbers are not rounded"
    assert steps[-1]["loss"] < steps[0]["loss"]

    recipe = recipes.load(run / "recipe.yaml")
    from pretrain.data import micro_batches, open_data

    data = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda line: None)
    seen = 0
    for step in range(12):
        seen += sum(
            sum(b.context.row_counts) for b in micro_batches(data.train, range(step * 4, step * 4 + 4), 2, step=step)
        )
        if step % 2:
            assert steps[step // 2]["tokens"] == seen < (step + 1) * 4 * 72, "padding does not count"


def test_tensorboard_shows_the_same(finished: tuple[Path, str]) -> None:
    assert_tensorboard_agrees(finished[0])


def test_resolved_recipe_is_the_recipe(finished: tuple[Path, str], digit_shards: Path) -> None:
    run, _ = finished
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["train"]["clip"] == 1.0 and written["model"]["vocab_size"] == 276, "defaults are written out"
    train = {**EVERY, "log_every": 2, "steps": 12}
    assert recipes.load(run / "recipe.yaml") == recipes.resolve(tiny_recipe(digit_shards, run, train=train))
    effective = yaml.safe_load((run / "deepspeed.json").read_text())
    assert effective["gradient_accumulation_steps"] == 2 and effective["zero_optimization"]["stage"] == 2


def test_checkpoints_are_pruned_and_the_best_is_kept(finished: tuple[Path, str]) -> None:
    run, _ = finished
    best = (run / "checkpoints" / "best").read_text().strip()
    folders = {p.name for p in (run / "checkpoints").iterdir() if p.is_dir()}
    assert folders == {"step-9", "step-12", best}
    assert (run / "checkpoints" / "latest").read_text() == "step-12\n"
    evaluations = {
        i["step"]: i["eval/causal/loss"] for i in metrics.read(run / "metrics.jsonl") if "eval/causal/loss" in i
    }
    assert best == f"step-{min((s for s in evaluations if s % 3 == 0), key=evaluations.__getitem__)}"


def test_the_model_left_behind_evaluates_to_the_same_numbers(finished: tuple[Path, str]) -> None:
    import zoo
    from pretrain import run_folder
    from pretrain.data import open_data
    from pretrain.evaluate import evaluate

    run, _ = finished
    model, recipe = run_folder.load_model(run)
    data = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda line: None)
    assert data.validation is not None
    objective = zoo.build("objective", recipe.objective, d_model=32, modalities=model.modalities)
    values = evaluate(model, model, objective, data.validation, recipe.evaluate.rows, recipe.train.micro_batch)
    reported = metrics.read(run / "metrics.jsonl")[-1]
    unigram = {f"eval/unigram/{name}": nats for name, nats in data.unigram_entropy("validation").items()}
    where = {key: reported[key] for key in ("step", "tokens", "flops", "seconds")}
    assert {**where, **values, **unigram} == reported


def test_the_screen(finished: tuple[Path, str]) -> None:
    _, printed = finished
    assert "step  2/12  loss " in printed and "kernels: attention runs on" in printed
    assert "evaluation after step 12: " in printed
    assert not [line for line in printed.splitlines() if "Warning" in line or "Traceback" in line], printed


# --------------------------------------------------------------------------- two ranks: stopped, resumed, never noticed


def stop_and_go(folder: Path, data: Path) -> dict[str, Any]:
    """Two ranks, one rendezvous, many runs; each interrupted one has an uninterrupted twin."""
    import pretrain.train
    from pretrain.pretraining import Pretraining

    taken = Pretraining.batches
    rank = int(os.environ["RANK"])
    codes: dict[str, list[int]] = {}

    def run(name: str, *signals: tuple[int, int, int], **changes: Any) -> None:
        """`signals`: (step, rank, signal) sent to itself by that rank."""

        def batches(self: Any, state: Any) -> Any:
            for when, whose, number in signals:
                if (state.step, rank) == (when, whose):
                    os.kill(os.getpid(), number)
            return taken(self, state)

        Pretraining.batches = batches  # type: ignore[method-assign]
        path = folder / f"{name}-{rank}.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(data, folder / name, **changes)))
        codes.setdefault(name, []).append(pretrain.train.main([str(path)]))

    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        run("whole", train=EVERY)
        run("stopped", (5, 1, signal.SIGUSR1), train=EVERY)
        run("stopped", (9, 0, signal.SIGTERM), train=EVERY)
        run("stopped", train=EVERY)
        background = {**EVERY, "checkpoint_in_background": True}
        run("background", (9, 0, signal.SIGTERM), train=background)
        run("background", train=background)
        run("longer", train={**EVERY, "steps": 8})
        run("longer", train=EVERY)
        run("bf16 whole", train=BF16)
        run("bf16", (8, 1, signal.SIGTERM), train=BF16)
        run("bf16", train=BF16)
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()) as said:
        run("bf16", train=BF16)
    if rank == 0:
        (folder / "said.txt").write_text(said.getvalue())
    return codes


@pytest.fixture(scope="module")
def stories(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    target = "tests.pretrain.test_train:stop_and_go"
    return folder, run_ranks(target, 2, folder / "scratch", 280, folder=folder, data=digit_shards)


def test_every_rank_ends_with_zero(stories: tuple[Path, list[dict[str, Any]]]) -> None:
    assert all(code == 0 for rank in stories[1] for codes in rank.values() for code in codes)
    said = [(stories[0] / "scratch" / f"output{rank}").read_text() for rank in (0, 1)]
    assert not [text for text in said if "Warning" in text], "\n".join(said)


@pytest.mark.parametrize("name", ["stopped", "background", "longer"])
def test_resumed_is_uninterrupted(stories: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    """Stopped by a signal to one rank, twice; and finished at 8 steps, then asked for 12. Bit for bit."""
    folder, _ = stories
    if name == "longer":  # the last step of the shorter run evaluates, as the eighth of the longer one does
        assert [i["step"] for i in steady(folder / "longer") if "loss" in i] == list(range(1, 13))
    assert_same_metrics(folder / name, folder / "whole")
    weights = [(folder / run / "model.safetensors").read_bytes() for run in (name, "whole")]
    assert weights[0] == weights[1]
    assert_tensorboard_agrees(folder / name)


def test_bf16_trains_and_resumes(stories: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = stories
    assert_same_metrics(folder / "bf16", folder / "bf16 whole")
    losses = [item["loss"] for item in steady(folder / "bf16") if "loss" in item]
    assert len(losses) == 20 and losses[-1] < 0.7 * losses[0]


def test_a_finished_run_says_so(stories: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = stories
    run = folder / "bf16"
    assert (
        f"{run} is finished: it has taken 20 of 20 steps, and the trained model lies in {run / 'model.safetensors'}; "
        "to go on, give a larger train.steps\n"
    ) in (folder / "said.txt").read_text()


def test_the_launcher(digit_shards: Path, stories: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    """`deepspeed --num_accelerators 2`: told to stop through one rank, resumed, equal to the uninterrupted run."""
    path = write_recipe(tmp_path, digit_shards, tmp_path / "run", train=EVERY)
    file = tmp_path / "run" / "metrics.jsonl"
    processes = launch([path], tmp_path / "printed")
    assert processes.wait_until(lambda: file.exists() and file.stat().st_size > 0), processes.printed()
    os.kill(rank_process(processes.members[0].pid, 1), signal.SIGUSR1)
    assert processes.wait() == [0], processes.printed()
    assert "told to stop: leaving after step" in processes.printed()
    again = start([path], tmp_path / "printed again", ranks=2)
    assert again.wait() == [0, 0], again.printed()
    assert f"resuming {tmp_path / 'run'} at step" in again.printed()
    assert_same_metrics(tmp_path / "run", stories[0] / "whole")


def rank_process(launcher: int, rank: int) -> int:
    """Process id of a rank among the descendants of the launcher."""
    waiting = [launcher]
    while waiting:
        process = waiting.pop()
        for task in Path(f"/proc/{process}/task").iterdir():
            children = [int(child) for child in (task / "children").read_text().split()]
            waiting += children
            for child in children:
                if f"--local_rank={rank}".encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
def test_offloaded_optimizer(digit_shards: Path, tmp_path: Path) -> None:
    """20 steps with the optimizer on the host (compiled at first use), and 9 + 11 of them."""
    changes = {
        "train": {"steps": 20},
        "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    }
    for name, steps in (("whole", (20,)), ("resumed", (9, 20))):
        path = write_recipe(tmp_path / f"{name} recipe", digit_shards, tmp_path / name, **changes)
        for count in steps:
            processes = start([path, f"train.steps={count}"], tmp_path / "printed")
            assert processes.wait(400) == [0], processes.printed()
    losses = [[i["loss"] for i in steady(tmp_path / run) if "loss" in i] for run in ("whole", "resumed")]
    # Not bit for bit: DeepSpeed's host optimizer multiplies β^t up step by step, and takes a power when it has been
    # loaded.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert torch.isfinite(torch.tensor(losses[0])).all()
