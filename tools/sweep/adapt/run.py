"""One run of a sweep over adaptations: judge, tune by the real command, judge again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pretrain.finetune.questions import Question, about_other_images, one_an_image, read_questions
from tools.sweep.adapt.plan import AdaptPoint
from tools.sweep.adapt.settings import TestConfig
from tools.sweep.folder import write_json
from tools.sweep.kind import Result
from tools.sweep.launch import attended
from zoo.config import UserError

if TYPE_CHECKING:
    from pretrain.finetune.prompt_batches import Prompts

BEFORE = "before.json"
"""What a run keeps of how the model answered before it was tuned."""
MODEL, STEPS = "model", "metrics.jsonl"
"""What a fine-tuning leaves in its folder: the trained model, and what it reported at each step."""


class Examiner:
    """Puts the questions of a sweep's test to models.

    Args:
        processor: of the models.
    """

    def __init__(self, test: TestConfig, processor: Any) -> None:
        from tools.sweep.adapt.metrics import METRICS

        self.test, self.processor, self.metric = test, processor, METRICS[test.metric]

    def encode(self, questions: Sequence[Question], answers: bool) -> Prompts:
        """Questions as models take them, with `answers` the right ones too."""
        from pretrain.finetune.prompt_batches import Prompts

        return Prompts.encode(questions, self.processor, self.test.batch, answers=answers)

    def about(self, questions: Sequence[Question]) -> Prompts:
        """Questions to judge by."""
        return self.encode(questions, self.metric.told)

    def judge(self, model: Any, prompts: Prompts) -> dict[str, Any]:
        """What `pretrain.finetune.judge.judge` finds, as JSON."""
        from pretrain.finetune.judge import judge

        return {key: value for key, value in judge(model, prompts, self.test.metric).items() if key != "logits"}


def work(folder: Path, settings: dict[str, Any]) -> Result:
    """Do what is left of a run; returns what it has found.

    Args:
        settings: `point`, `recipe` (of the fine-tuning, resolved), `test`, `threshold`, `tolerance`, `keep_models`.
    Raises:
        UserError: the training failed, or something cannot be opened.
    """
    from pretrain.finetune import model as models
    from pretrain.finetune.recipe import FinetuneRecipe
    from pretrain.process_group import choose_device

    point, test = AdaptPoint.read(settings["point"]), TestConfig.parse(settings["test"])
    recipe = FinetuneRecipe.parse(settings["recipe"])
    device = choose_device(recipe.train.device)
    models.quiet(0)
    base = models.open_base(recipe)
    examiner = Examiner(test, base.processor)
    questions = read_questions(Path(recipe.data.path), test.split)[: test.samples]
    prompts = examiner.about(questions)
    first = examiner.about(questions[: test.before]) if point.train and test.before else prompts
    before = _kept(folder / BEFORE, lambda: examiner.judge(models.first_model(recipe, base).to(device).eval(), first))
    result: dict[str, Any] = {"point": settings["point"], "before": before, "after": before}
    if not point.train:
        return result
    result["training_seconds"] = train(folder, settings["recipe"])
    model = _trained(recipe.folder / MODEL, point, device)
    result["after"] = examiner.judge(model, prompts)
    if examiner.metric.told and point.adapt is None and (others := _about_others(questions)):
        result["exchanged"] = examiner.judge(model, examiner.about(others))
    if point.learned:
        found = _tuned(model, examiner, point, settings, Path(recipe.data.path))
        result["threshold"] = {"validation": found, **examiner.judge(model, prompts)}
    shutil.copyfile(recipe.folder / STEPS, folder / STEPS)
    if settings["keep_models"]:
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        shutil.move(recipe.folder / MODEL, folder / MODEL)
    return result


def _tuned(model: Any, examiner: Examiner, point: AdaptPoint, settings: dict[str, Any], data: Path) -> dict[str, Any]:
    """Leave the model under one threshold in place of top-k; returns what `tune_threshold` says of it."""
    from tools.sweep.adapt.threshold import tune_threshold

    tuning = settings["threshold"]
    held_out = one_an_image(read_questions(data, tuning["split"]), tuning["samples"])
    prompts = examiner.encode(held_out, answers=False)
    return tune_threshold(model, prompts, point.target, settings["tolerance"], tuning["rounds"])


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
    code = attended([sys.executable, "-m", "pretrain.finetune", str(path)], of_a_sweep=True)
    if code or not (run / MODEL).exists():
        raise UserError(f"the training ended with exit code {code} before its last step")
    lines = [json.loads(line) for line in (run / STEPS).read_text().splitlines()]
    return max((line["seconds"] for line in lines if "seconds" in line), default=None)


def _trained(folder: Path, point: AdaptPoint, device: str) -> Any:
    """The model that a fine-tuning has left in its folder, in fp32 and in evaluation."""
    import torch
    import transformers

    from zoo.adapt import load_adapted
    from zoo.adapt.folder import open_whole

    dense = transformers.AutoModelForImageTextToText
    model: Any = load_adapted(folder) if point.adapt is not None else open_whole(dense, folder)
    return model.to(device, torch.float32).eval()


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `path` holds, made and written if it is not there."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())
