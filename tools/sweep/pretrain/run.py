"""One run of a sweep over pretrainings: its trainings, one after the other, each by the command that a user would
give."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain import run_folder
from pretrain.checkpoint import STATE
from tools.sweep.kind import Result
from tools.sweep.launch import attended
from tools.sweep.pretrain.curves import evaluations
from zoo.config import UserError

STAGES = {"train": "trained", "upcycle": "upcycled", "routers": "routers"}
"""Run folder of a stage, by its kind, inside the run's own."""


def folders(folder: Path, settings: Mapping[str, Any]) -> list[Path]:
    """Run folders of the stages, in order."""
    return [folder / STAGES[stage["kind"]] for stage in settings["stages"]]


def work(folder: Path, settings: dict[str, Any]) -> Result:
    """Do what is left of a run; returns what it has found.

    Args:
        settings: `point`, `stages`, `accelerators`, `keep_models`.
    Raises:
        UserError: a training failed, or was told to stop.
    """
    trained = folders(folder, settings)
    before: Path | None = None
    for stage, run in zip(settings["stages"], trained, strict=True):
        recipe = run.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump(stage["recipe"], sort_keys=False, allow_unicode=True))
        train_stage(stage["kind"], run, before, settings["accelerators"], stage["overrides"], of_a_sweep=True)
        done, steps = int(run_folder.newest_checkpoint(run).name.rpartition("-")[2]), stage["steps"]
        if done < steps:
            raise UserError(f"{run} was told to stop after {done} of {steps} steps")
        before = run
    state = json.loads((run_folder.newest_checkpoint(trained[0]) / STATE).read_text(encoding="utf-8"))
    result: Result = {
        "point": settings["point"],
        "data": state["data"],
        "validation": state["validation"],
        "last": evaluations(trained)[-1].values if evaluations(trained) else {},
        "peak_memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
    }
    if not settings["keep_models"]:
        for run in trained:
            shutil.rmtree(run / run_folder.CHECKPOINTS, ignore_errors=True)
            for name in (run_folder.WEIGHTS, run_folder.INITIAL):
                (run / name).unlink(missing_ok=True)
    return result


def train_stage(
    kind: str,
    run: Path,
    before: Path | None,
    accelerators: int,
    overrides: Sequence[str] = (),
    of_a_sweep: bool = False,
) -> None:
    """Do what is left of a stage; arguments as for `commands` and `attended`.

    Raises:
        UserError: a command failed.
    """
    for words in commands(kind, run, before, accelerators, overrides):
        print("$", *words, flush=True)
        full = [sys.executable, "-m", *words[1:]] if words[0] == "python" else _program(words)
        if code := attended(full, of_a_sweep):
            raise UserError(f"{' '.join(words)} ended with exit code {code}")


def commands(
    kind: str, run: Path, before: Path | None, accelerators: int, overrides: Sequence[str] = ()
) -> list[list[str]]:
    """What a user would give for a stage; the same commands go on with it.

    Args:
        kind: of the stage, see `plan.Stage`.
        run: its run folder; the recipe lies beside it under the same name.
        before: the run folder of the stage before.
        overrides: of a stage that trains routers.
    """
    launcher = ["deepspeed", "--num_accelerators", f"{accelerators}", "--master_port", f"{_free_port()}", "--module"]
    recipe = str(run.with_suffix(".yaml"))
    if kind == "routers":
        assert before is not None, "routers are trained after a model"
        return [[*launcher, "tools.train_routers", str(before), f"run_dir={run}", *overrides]]
    train = [*launcher, "pretrain.train", recipe]
    begun = (run / run_folder.RECIPE).exists() or (run / run_folder.INITIAL_POSITION).exists()
    if kind == "train" or begun:
        return [train]
    assert before is not None, "something is upcycled"
    return [["python", "tools.upcycle", str(before), recipe, "--rows", "0"], train]


def _program(words: Sequence[str]) -> list[str]:
    """`words` with the program that is installed beside this Python."""
    beside = Path(sys.executable).with_name(words[0])
    return [str(beside) if beside.exists() else words[0], *words[1:]]


def _free_port() -> int:
    """A port of this machine for the ranks to meet at: several runs may go on side by side."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]
