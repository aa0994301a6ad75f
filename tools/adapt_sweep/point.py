"""One run of a sweep, in a process of its own: judge, tune by the real command, judge again.

    python -m tools.adapt_sweep.point FOLDER

FOLDER holds `point.json`, written by the sweep; it gets `result.json`.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.adapt_sweep.plan import Point
from tools.adapt_sweep.settings import TestConfig
from zoo.config import UserError

POINT, RESULT, BEFORE, STEPS, RUN = "point.json", "result.json", "before.json", "metrics.jsonl", "run"


def main(arguments: list[str] | None = None) -> int:
    (folder,) = map(Path, sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the training is waited for
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that a killed sweep has left behind ends soon
        if not (folder / RESULT).exists():
            try:
                work(folder, json.loads((folder / POINT).read_text()))
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                return 130
    return 0


def work(folder: Path, settings: dict[str, Any]) -> None:
    """Do what is left of a run.

    Args:
        settings: `point`, `recipe` (of the fine-tuning, resolved), `test`, `threshold`, `tolerance`, `keep_models`.
    Raises:
        UserError: the training failed, or something cannot be opened.
    """
    import torch

    from pretrain.finetune import model as models
    from pretrain.finetune.questions import Question, read_questions
    from pretrain.finetune.recipe import AdaptRecipe
    from pretrain.process_group import choose_device
    from tools.adapt_sweep.judge import judge
    from tools.adapt_sweep.metrics import METRICS
    from tools.adapt_sweep.prompts import Prompts, exchanged, one_an_image
    from tools.adapt_sweep.threshold import tune_threshold
    from zoo.adapt import load_adapted

    point, test = Point.read(settings["point"]), TestConfig.parse(settings["test"])
    recipe = AdaptRecipe.parse(settings["recipe"])
    device, data = choose_device(recipe.train.device), Path(recipe.data.path)
    models.quiet(0)
    base = models.open_base(recipe)
    questions = read_questions(data, test.split)[: test.samples]
    metric = METRICS[test.metric]

    def encoded(questions: Sequence[Question]) -> Prompts:
        return Prompts.encode(questions, base.processor, test.batch, answers=metric.told)

    def judged(model: Any, prompts: Prompts) -> dict[str, Any]:
        return {key: value for key, value in judge(model, prompts, test.metric).items() if key != "logits"}

    prompts = encoded(questions)
    first = encoded(questions[: test.before]) if point.train and test.before else prompts
    before = _kept(folder / BEFORE, lambda: judged(models.whole(recipe, base).to(device).eval(), first))
    result: dict[str, Any] = {"point": settings["point"], "before": before, "after": before}
    if point.train:
        seconds = train(folder, settings["recipe"])
        model = load_adapted(recipe.folder / "model") if point.adapt is not None else _dense(recipe.folder / "model")
        model = model.to(device, torch.float32).eval()
        result |= {"after": judged(model, prompts), "training_seconds": seconds}
        if metric.told and point.adapt is None and (others := exchanged(questions)):
            result["exchanged"] = judged(model, encoded(others))
        if point.learned:
            tuning = settings["threshold"]
            held_out = one_an_image(read_questions(data, tuning["split"]), tuning["samples"])
            read = Prompts.encode(held_out, base.processor, test.batch)
            found = tune_threshold(model, read, point.target, settings["tolerance"], tuning["rounds"])
            result["threshold"] = {"validation": found, **judged(model, prompts)}
    temporary = folder / (RESULT + ".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    if point.train:
        shutil.copyfile(recipe.folder / STEPS, folder / STEPS)
        if settings["keep_models"]:
            shutil.rmtree(folder / "model", ignore_errors=True)
            shutil.move(recipe.folder / "model", folder / "model")
    os.replace(temporary, folder / RESULT)
    shutil.rmtree(recipe.folder, ignore_errors=True)  # with its checkpoints


def train(folder: Path, recipe: dict[str, Any]) -> float | None:
    """Tune, or go on with it; returns the seconds of its steps up to the last that was logged, None if none was.

    Raises:
        UserError: it ended before its last step.
    """
    path, run = folder / "recipe.yaml", Path(recipe["run_dir"])
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    command = [sys.executable, "-m", "pretrain.finetune", str(path)]
    sweep = os.getppid()
    training = subprocess.Popen(command)
    try:
        while training.poll() is None:
            if os.getppid() != sweep:  # the sweep was killed: its next call goes on from a checkpoint
                raise UserError("the sweep is gone")
            time.sleep(0.2)
    finally:
        if training.poll() is None:
            training.send_signal(signal.SIGTERM)
            training.wait()
    if training.returncode or not (run / "model").exists():
        raise UserError(f"the training ended with exit code {training.returncode} before its last step")
    lines = [json.loads(line) for line in (run / STEPS).read_text().splitlines()]
    return max((line["seconds"] for line in lines if "seconds" in line), default=None)


def _dense(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForImageTextToText.from_pretrained(folder)


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds, made and written if it is not there."""
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(make(), indent=1) + "\n")
        os.replace(temporary, path)
    return json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
