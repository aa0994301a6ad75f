"""One run of a sweep over adaptations: judge, tune by the real command, judge again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.finetune.questions import Question, about_other_images, one_an_image, read_questions
from tools.sweep.adapt.plan import Point
from tools.sweep.adapt.settings import TestConfig
from tools.sweep.folder import write_json
from tools.sweep.kind import Result
from tools.sweep.launch import attended
from zoo.config import UserError

BEFORE = "before.json"
"""What a run keeps of how the model answered before it was tuned."""
MODEL, STEPS = "model", "metrics.jsonl"
"""What a fine-tuning leaves in its folder: the trained model, and what it reported at each step."""


def work(folder: Path, settings: dict[str, Any]) -> Result:
    """Do what is left of a run; returns what it has found.

    Args:
        settings: `point`, `recipe` (of the fine-tuning, resolved), `test`, `threshold`, `tolerance`, `keep_models`.
    Raises:
        UserError: the training failed, or something cannot be opened.
    """
    import torch

    from pretrain.finetune import model as models
    from pretrain.finetune.judge import judge
    from pretrain.finetune.prompt_batches import Prompts
    from pretrain.finetune.recipe import FinetuneRecipe
    from pretrain.process_group import choose_device
    from tools.sweep.adapt.metrics import METRICS
    from tools.sweep.adapt.threshold import tune_threshold
    from zoo.adapt import load_adapted

    point, test = Point.read(settings["point"]), TestConfig.parse(settings["test"])
    recipe = FinetuneRecipe.parse(settings["recipe"])
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
    before = _kept(folder / BEFORE, lambda: judged(models.first_model(recipe, base).to(device).eval(), first))
    result: dict[str, Any] = {"point": settings["point"], "before": before, "after": before}
    if point.train:
        seconds = train(folder, settings["recipe"])
        model = load_adapted(recipe.folder / MODEL) if point.adapt is not None else _dense(recipe.folder / MODEL)
        model = model.to(device, torch.float32).eval()
        result |= {"after": judged(model, prompts), "training_seconds": seconds}
        if metric.told and point.adapt is None and (others := _about_others(questions)):
            result["exchanged"] = judged(model, encoded(others))
        if point.learned:
            tuning = settings["threshold"]
            held_out = one_an_image(read_questions(data, tuning["split"]), tuning["samples"])
            read = Prompts.encode(held_out, base.processor, test.batch)
            found = tune_threshold(model, read, point.target, settings["tolerance"], tuning["rounds"])
            result["threshold"] = {"validation": found, **judged(model, prompts)}
        shutil.copyfile(recipe.folder / STEPS, folder / STEPS)
        if settings["keep_models"]:
            shutil.rmtree(folder / MODEL, ignore_errors=True)
            shutil.move(recipe.folder / MODEL, folder / MODEL)
    return result


def _about_others(questions: Sequence[Question]) -> list[Question]:
    """The questions about images, each about those of another; none where they cannot be exchanged."""
    try:
        return about_other_images([question for question in questions if question.images])
    except UserError:
        return []


def train(folder: Path, recipe: dict[str, Any]) -> float | None:
    """Tune, or go on with it; returns the seconds of its steps up to the last that was logged, None if none was.

    Raises:
        UserError: it ended before its last step.
    """
    path, run = folder / "recipe.yaml", Path(recipe["run_dir"])
    path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
    code = attended([sys.executable, "-m", "pretrain.finetune", str(path)])
    if code or not (run / MODEL).exists():
        raise UserError(f"the training ended with exit code {code} before its last step")
    lines = [json.loads(line) for line in (run / STEPS).read_text().splitlines()]
    return max((line["seconds"] for line in lines if "seconds" in line), default=None)


def _dense(folder: Path) -> Any:
    import transformers

    from zoo.adapt.folder import open_whole

    return open_whole(transformers.AutoModelForImageTextToText, folder)


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds, made and written if it is not there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())
