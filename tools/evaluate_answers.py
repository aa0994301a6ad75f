"""How well a multimodal LLM, dense or with Mixture-of-Depths layers, answers questions about images, and what it costs.

    python -m tools.evaluate_answers MODEL DATA [--split test] [--samples N]
    python -m tools.evaluate_answers MODEL DATA --adapt RECIPE.yaml [adapt.key=value ...]

MODEL is a folder of a whole dense model (or its name on the hub; merge LoRA adapters into it first), or one of an
adapted model, as `zoo.adapt.save_adapted` and `pretrain.finetune` write it. DATA is a folder of JSON lines (`image,
question, answer`). `--adapt` makes layers of a dense MODEL Mixture-of-Depths layers, untuned, by the `adapt:` section
of a recipe. `--exchange-images` asks every question about other images: what is still answered right was not read off
its own.

Prints the loss of the right answers, the share of generated answers that are right, the decoder's FLOPs for a sample
with its answers as a share of the dense decoder's, and the share of image tokens that each routed layer skips.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import recipe as recipes
from pretrain.finetune.generation import kinds_of
from pretrain.finetune.questions import Question, about_other_images, read_questions
from zoo.config import UserError

UNTRAINED = "note: these routers are untrained: they rank tokens, and weigh what layers do to them, by chance"
NO_LOSS = (
    "note: an attention router ranks by the last token it is given, after the right answer one of that answer; only "
    "generated answers are judged"
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        _check(options)
        result = evaluated(options)
        rows = table(result)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:{width}}  {value}")
        if options.json is not None:
            write(result, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def evaluated(options: argparse.Namespace) -> dict[str, Any]:
    """Do what the command says.

    Returns:
        What was asked for, `answers`, how many there are of each kind, `adapt`, how the model is adapted, and `values`,
        as `pretrain.finetune.evaluate.evaluate` has them, without what would not be right.
    Raises:
        UserError: the model, the recipe or the data cannot be used, or do not fit each other.
    """
    import tqdm

    import zoo.adapt as za
    from pretrain.finetune.evaluate import evaluate
    from pretrain.finetune.model import quiet
    from pretrain.finetune.model_folder import open_model
    from pretrain.finetune.samples import Batcher
    from zoo.adapt.family import parts, picture_ids

    quiet(0)
    config = None if options.adapt is None else read_adapt(options.adapt, options.overrides)
    questions, filler = asked(options.data, options.split, options.samples, options.exchange_images)
    model, processor = open_model(options.model, options.device)
    if config is not None:
        if za.adaptation(model) is not None:
            raise UserError(
                f"--adapt {options.adapt}: {options.model} is adapted already; leave --adapt out, or give the dense "
                "model it was made of"
            )
        try:
            za.adapt(model, config)
        except UserError as error:
            raise UserError(f"adapt: {error}") from None
        if config.router.learned:
            print(UNTRAINED)
    config, found = za.adaptation(model), parts(model)
    looks_back = config is not None and config.router.type == "attention"
    if looks_back and not options.generate:
        raise UserError(
            "--no-generate: an attention router ranks by the last token it is given, after the right answer one of that"
            " answer, so that its one pass cannot be judged; leave --no-generate out"
        )
    top = found.top.config
    batcher = Batcher(processor, filler, top, picture_ids(top, options.model), config, training=False)
    counts = Counter(kind for question in questions for kind in kinds_of(question))
    total = len(questions) + (counts.total() if options.generate else 0)
    with tqdm.tqdm(total=total, desc="answering", unit="question", disable=None) as bar:
        values = evaluate(
            model,
            model,
            model,
            batcher,
            questions,
            options.batch,
            options.generate,
            device=model.device,
            dtype=found.base.dtype,
            progress=bar.update,
        )
    if looks_back:
        print(NO_LOSS)
        values = {name: value for name, value in values.items() if not name.startswith(("eval/loss", "eval/forced"))}
    return {
        "model": options.model,
        "data": str(options.data),
        "split": options.split,
        "questions": len(questions),
        "exchange_images": options.exchange_images,
        "recipe": None if options.adapt is None else str(options.adapt),
        "adapt": None if config is None else config.model_dump(mode="json"),
        "answers": dict(counts),
        "values": values,
    }


def read_adapt(path: Path, overrides: Sequence[str]) -> Any:
    """The AdaptConfig that a recipe's `adapt:` section is.

    Raises:
        UserError: there is none, it is wrong, or an override is of another section.
    """
    from zoo.adapt import AdaptConfig

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


def write(result: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where it cannot."""
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); give another file") from None
    print(f"{path} is written")


def table(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `evaluated` found, in words."""
    values, counts = result["values"], result["answers"]
    total = sum(counts.values())
    rows = [("questions", str(result["questions"]) + (", about other images" if result["exchange_images"] else ""))]
    if "eval/loss" in values:
        loss = values["eval/loss"]
        rows.append(("loss", f"{loss:.4f} nats a token of the answers"))
        rows.append(("perplexity", f"{math.exp(min(loss, 700)):.4g}"))
    name, title = ("accuracy", "accuracy") if "eval/accuracy" in values else ("forced_accuracy", "accuracy in one pass")
    rows.append((title, _share(values[f"eval/{name}"], total)))
    rows += [
        (f"  {kind}", _share(values[f"eval/{name}/{kind}"], counts[kind])) for kind in sorted(filter(None, counts))
    ]
    rows.append(("decoder FLOPs / dense", f"{values['eval/flops_ratio']:.3f}"))
    if "eval/skip" in values:
        rows.append(("skipped", f"{values['eval/skip']:6.1%} of what could be, over routed layers"))
        layers = [name for name in values if name.startswith("eval/skip/")]
        rows += [(f"  layer {layer.rpartition('.')[2]:>2}", f"{values[layer]:6.1%}") for layer in layers]
    return rows


def _share(share: float, count: int) -> str:
    return f"{share:6.1%} ({round(share * count)} of {count})"


def _check(options: argparse.Namespace) -> None:
    for name in ("samples", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.overrides and options.adapt is None:
        raise UserError(f"{options.overrides[0]!r}: is a key of a recipe, and there is none; give --adapt RECIPE.yaml")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json {options.json}: must be a file in a folder that exists")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.evaluate_answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model (or the name of a dense one on the hub)")
    parser.add_argument("data", type=Path, help="folder of .jsonl files and images")
    parser.add_argument("overrides", nargs="*", metavar="adapt.key=value", help="laid over the recipe of --adapt")
    parser.add_argument("--split", default="test", help="which .jsonl (test)")
    parser.add_argument("--samples", type=int, metavar="N", help="the first N questions (all)")
    parser.add_argument("--batch", type=int, default=32, help="questions a forward pass (32)")
    parser.add_argument("--adapt", type=Path, metavar="RECIPE.yaml", help="adapt a dense MODEL by this, without tuning")
    parser.add_argument(
        "--no-generate",
        dest="generate",
        action="store_false",
        help="no generation: an answer is right where each of its tokens is the likeliest after the right ones",
    )
    parser.add_argument(
        "--exchange-images",
        action="store_true",
        help="ask about images of another question; those without any are left out",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures, unrounded")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (cuda where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
