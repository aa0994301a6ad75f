"""What goes wrong in the middle of a run: losses that are not numbers, a full disk, a checkpoint of another model."""

from __future__ import annotations

import contextlib
import io
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from pretrain import metrics
from tests.pretrain import poison
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import EXPERTS, LAYER, assert_same_metrics, assert_tensorboard_agrees, tiny_recipe

TRAIN = {"steps": 8, "checkpoint_every": 2, "max_bad_steps": 3}
POISONED = [LAYER, {"mixer": {"type": "attention", "heads": 2}, "feedforward": {"type": "poisoned"}}]
LIMIT = 30_000
"""Bytes a file may have on the "full" disk; a checkpoint's are larger, the metrics' smaller."""


def accidents(folder: Path, data: Path) -> dict[str, list[tuple[int, str]]]:
    """One rank, many runs: name → (exit code, message) of each time the command was given."""
    import pretrain.train
    from pretrain.loop import Loop
    from tests.pretrain.runs import one_rendezvous

    results: dict[str, list[tuple[int, str]]] = {}
    plain_save, plain_log = Loop._save, Loop._log

    def run(name: str, run_dir: str, /, **changes: Any) -> None:
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(data, folder / run_dir, **{"train": TRAIN, **changes})))
        error = io.StringIO()
        with contextlib.redirect_stderr(error):
            code = pretrain.train.main([str(path)])
        results.setdefault(name, []).append((code, error.getvalue()))

    def full_from(step: int) -> Any:
        def save(self: Any, values: Any, later: bool = False) -> None:
            if self.state.step == step:
                resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))
            plain_save(self, values, later)

        return save

    def full_log(self: Any, *rest: Any) -> None:
        if self.state.step == 5:
            size = (folder / "full log" / "metrics.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, resource.RLIM_INFINITY))
        plain_log(self, *rest)

    own = {"imports": ["tests.pretrain.poison"], "model": {"layers": POISONED}}
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        run("whole", "whole")
        poison.BAD |= {1, 2, 5}
        run("skipped", "skipped", **own)
        poison.BAD |= {4, 5, 6}
        run("ended", "ended", **own)
        run("never began", "never began", **own | {"train": TRAIN | {"checkpoint_every": 0}})
        results["left"] = [(0, " ".join(sorted(p.name for p in (folder / "ended" / "checkpoints").iterdir())))]
        poison.BAD.clear()
        run("ended", "ended", **own | {"optimizer": {"lr": 1e-3}, "train": TRAIN | {"clip": 0.5}})  # as it was advised

        Loop._save = full_from(4)  # type: ignore[method-assign]
        run("full", "full")
        Loop._save = plain_save  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results["left on the full disk"] = [
            (0, " ".join(sorted(p.name for p in (folder / "full" / "checkpoints").iterdir())))
        ]
        run("full", "full")

        Loop._log = full_log  # type: ignore[method-assign]
        run("full log", "full log")
        Loop._log = plain_log  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        run("full log", "full log")

        second = LAYER | {"feedforward": EXPERTS | {"d_ff": 48}, "depth": {"type": "mod", "capacity": 0.5}}
        wider = {"model": {"layers": [LAYER, second]}}
        recipe = folder / "full" / "recipe.yaml"
        run("wider", "elsewhere", **wider)
        recipe.write_text((folder / "elsewhere" / "recipe.yaml").read_text().replace("elsewhere", "full"))
        run("edited by hand", "full", **wider)
    return results


@pytest.fixture(scope="module")
def story(
    digit_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[tuple[int, str]]]]:
    folder = tmp_path_factory.mktemp("accidents")
    target = "tests.pretrain.test_bad_runs:accidents"
    return folder, run_ranks(target, 1, folder / "scratch", 280, folder=folder, data=digit_shards)[0]


Story = tuple[Path, dict[str, list[tuple[int, str]]]]


def test_bad_steps_are_skipped_and_counted(story: Story) -> None:
    folder, results = story
    assert results["skipped"] == [(0, "")]
    steps = [item for item in metrics.read(folder / "skipped" / "metrics.jsonl") if "loss" in item]
    assert [item["bad_steps"] for item in steps] == [0, 1, 2, 2, 2, 3, 3, 3]
    assert [math.isfinite(item["loss"]) for item in steps] == [True, False, False, True, True, False, True, True]
    assert all(w.isfinite().all() for w in load_file(folder / "skipped" / "model.safetensors").values())


def test_too_many_bad_steps_end_the_run(story: Story) -> None:
    folder, results = story
    (code, message), again = results["ended"]
    assert code == 2
    assert message.startswith(
        "error: train.max_bad_steps: 3 steps in a row had a non-finite loss or gradient, the last one 7"
    )
    advice = "the checkpoint of step 6 is intact: lower optimizer.lr, set train.clip, or look at the data"
    assert advice in message and message.count("\n") == 1
    [(code, message)] = results["never began"]
    assert code == 2 and "there is no checkpoint yet: lower optimizer.lr" in message
    assert results["left"] == [(0, "latest step-4 step-6")]
    assert again == (0, ""), "once the reason is gone, the same command goes on"
    steps = [item["step"] for item in metrics.read(folder / "ended" / "metrics.jsonl") if "loss" in item]
    assert steps == list(range(1, 9))


def test_full_disk(story: Story) -> None:
    folder, results = story
    (code, message), again = results["full"]
    assert code == 2
    assert message.startswith("error: the checkpoint of step 4 could not be written: rank 0: ")
    assert "Free space or repair the disk; earlier checkpoints are intact" in message and message.count("\n") == 1
    assert results["left on the full disk"] == [(0, "latest step-2")]
    assert again == (0, "")
    assert_same_metrics(folder / "full", folder / "whole")
    assert_tensorboard_agrees(folder / "full")


def test_disk_that_fills_up_while_logging(story: Story) -> None:
    folder, results = story
    (code, message), again = results["full log"]
    assert code == 2
    assert "cannot be written (File too large); free space and give the same command again" in message
    assert message.startswith("error: ") and message.count("\n") == 1
    assert again == (0, "")
    assert_same_metrics(folder / "full log", folder / "whole")
    assert_tensorboard_agrees(folder / "full log")


def test_checkpoint_of_another_architecture(story: Story) -> None:
    _, results = story
    assert results["wider"] == [(0, "")]
    [(code, message)] = results["edited by hand"]
    assert code == 2
    assert "is of another model: " in message
    assert "layers.1.block.feedforward" in message and "in the checkpoint" in message and "in this run" in message
    assert "Use the recipe it was trained with, or another name or run_dir" in message and message.count("\n") == 1
