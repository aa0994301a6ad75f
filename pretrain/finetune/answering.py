"""How well a model in a folder, dense or adapted, answers the questions of a data folder, and at which cost."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

import zoo.adapt as za
from pretrain import recipe as recipes
from pretrain.finetune.batcher import Batcher
from pretrain.finetune.evaluate import EvaluatedModel, evaluate
from pretrain.finetune.generation import kinds_of
from pretrain.finetune.model import quiet
from pretrain.finetune.model_folder import open_model
from pretrain.finetune.questions import Question, about_other_images, read_questions
from zoo.adapt import AdaptConfig
from zoo.adapt.family import parts, picture_ids
from zoo.config import UserError

UNTRAINED = "note: these routers are untrained: they rank tokens, and weigh what layers do to them, by chance"
NO_LOSS = (
    "note: an attention router ranks by the last token it is given, after the right answer one of that answer; only "
    "generated answers are judged"
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be evaluated; the options of `tools.evaluate_answers`."""

    model: str
    """Folder of a dense or adapted model, or the name of a dense one on the hub."""
    data: Path
    """Folder of the questions."""
    split: str = "test"
    samples: int | None = None
    """The first so many questions; None: all."""
    batch: int = 32
    """Questions a forward pass."""
    generate: bool = True
    """Let the model say its own answers; False: they are judged in one pass."""
    exchange_images: bool = False
    """Ask about the images of another question."""
    adapt: Path | None = None
    """A recipe by whose section `adapt` a dense model is adapted, without tuning."""
    overrides: Sequence[str] = ()
    """`adapt.key=value`, laid over that recipe."""
    device: str = "auto"


def evaluated(request: Request) -> dict[str, Any]:
    """Evaluate what is requested.

    Returns:
        What was asked for, `answers`, how many there are of each kind, `adapt`, how the model is adapted, and `values`,
        as `pretrain.finetune.evaluate.AnswerSums.values` has them, without what would not be right.
    Raises:
        UserError: the model, the recipe or the data cannot be used, or do not fit each other.
    """
    quiet(0)
    config = None if request.adapt is None else read_adapt(request.adapt, request.overrides)
    questions, filler = asked(request.data, request.split, request.samples, request.exchange_images)
    model, processor = open_model(request.model, request.device)
    if config is not None:
        _adapt(model, config, request)
    config = za.adaptation(model)
    told = _can_be_told(config, request)
    counts = Counter(kind for question in questions for kind in kinds_of(question))
    top = parts(model).top.config
    batcher = Batcher(processor, filler, top, picture_ids(top, request.model), config, training=False)
    subject = EvaluatedModel(model, model, model, model.device, parts(model).base.dtype)
    total = len(questions) + (counts.total() if request.generate else 0)
    with tqdm.tqdm(total=total, desc="answering", unit="question", disable=None) as bar:
        sums = evaluate(subject, batcher, questions, request.batch, request.generate, bar.update)
    if not told:
        print(NO_LOSS)
    return {
        "model": request.model,
        "data": str(request.data),
        "split": request.split,
        "questions": len(questions),
        "exchange_images": request.exchange_images,
        "recipe": None if request.adapt is None else str(request.adapt),
        "adapt": None if config is None else config.model_dump(mode="json"),
        "answers": dict(counts),
        "values": sums.values(generated=request.generate, told=told),
    }


def _can_be_told(config: AdaptConfig | None, request: Request) -> bool:
    """Whether the model may be judged by one pass with the right answers in it.

    Raises:
        UserError: it may not, and nothing else is requested.
    """
    looks_back = config is not None and config.router.type == "attention"
    if looks_back and not request.generate:
        raise UserError(
            "--no-generate: an attention router ranks by the last token it is given, after the right answer one of that"
            " answer, so that its one pass cannot be judged; leave --no-generate out"
        )
    return not looks_back


def _adapt(model: Any, config: AdaptConfig, request: Request) -> None:
    """Adapt a dense model without tuning; what its routers are worth is printed."""
    if za.adaptation(model) is not None:
        raise UserError(
            f"--adapt {request.adapt}: {request.model} is adapted already; leave --adapt out, or give the dense model "
            "it was made of"
        )
    try:
        za.adapt(model, config)
    except UserError as error:
        raise UserError(f"adapt: {error}") from None
    if config.router.learned:
        print(UNTRAINED)


def read_adapt(path: Path, overrides: Sequence[str]) -> AdaptConfig:
    """The AdaptConfig that a recipe's `adapt:` section is.

    Raises:
        UserError: there is none, it is wrong, or an override is of another section.
    """
    for text in overrides:
        if not text.startswith(("adapt.", "adapt=")):
            raise UserError(f"{text!r}: only keys of the section adapt count here; write adapt.key=value")
    section = recipes.read(path, overrides).get("adapt")
    if section is None:
        raise UserError(f"--adapt {path}: has no section adapt; give a recipe such as recipes/adapt/gamma_mod.yaml")
    return AdaptConfig.parse(section, "adapt")


def asked(data: Path, split: str, samples: int | None, exchange: bool) -> tuple[list[Question], Question]:
    """The first `samples` questions of a split (None: all), and one with an image.

    Args:
        exchange: ask each about images of another, and leave out those that have none; see `about_other_images`.
    Raises:
        UserError: there are none, or none with an image.
    """
    if not data.is_dir():
        raise UserError(f"{data}: is not a folder; give one with {split}.jsonl and the images")
    questions = read_questions(data, split)
    pictured = [question for question in questions if question.images]
    if not pictured:
        raise UserError(
            f"{data / split}.jsonl: none of its {len(questions)} lines has an image; some must: "
            '{"image": "a.png", "question": …, "answer": …}'
        )
    if exchange:
        try:
            questions = about_other_images(pictured, samples)
        except UserError as error:
            raise UserError(f"--exchange-images: {error}, or leave --exchange-images out") from None
    return questions[:samples], pictured[0]
