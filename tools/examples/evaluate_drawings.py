"""What a model trained on captioned drawings has learned, on captions and drawings that it never saw.

    python -m tools.examples.evaluate_drawings RECIPE [key.sub=value ...] [--captions N] [--guidance W]

Draws from held-out captions, lets a classifier fitted on real training drawings say what category it sees, looks for
the nearest training drawing, asks for the caption of held-out drawings, prints one table and writes `summary.json`,
`drawings.png` and `loss.png` into the run's `report/`. Documents must say their `category`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import zoo
from pretrain import recipe as recipes
from pretrain import report
from pretrain.data import DataConfig
from tools.evaluate.judging import Share
from tools.examples.captions import add_sampling, sampling_of
from tools.examples.judge_drawings import TEMPERATURE, Captioned, evaluate, nearest, read_captioned
from zoo.config import UserError

SHOWN = 12
"""Captions in the picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        path = _folder(recipe.data)
        trained = zoo.load(recipe.folder, imports=recipe.imports)
        training, held_out = (read_captioned(path, pattern, trained) for pattern in _patterns(recipe.data))
        chosen = np.random.default_rng(recipe.seed).permutation(len(held_out.captions))[: options.captions]
        held_out = held_out.pick(chosen)
        sampling = sampling_of(options)
        summary, drawn = evaluate(trained, training, held_out, sampling, recipe.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = recipe.folder
    report.write_summary(run, summary | {"sampling": f"{sampling}, temperature {TEMPERATURE} where ids are chosen"})
    report.draw_losses(run)
    title = "held-out caption: a real drawing, the model's, and the training drawing nearest to the model's"
    report.draw_images(sheet(held_out, drawn, training), report.folder_of(run) / "drawings.png", title)
    report.print_table(f"{run.name}: {sum(p.numel() for p in trained.model.parameters()):,} parameters", table(summary))
    print(f"pictures and summary.json are in {report.folder_of(run)}")
    return 0


def sheet(held_out: Captioned, drawn: np.ndarray, training: Captioned) -> dict[str, list[np.ndarray]]:
    """Rows of three pictures by caption: one caption of each category in turn, so that all are shown."""
    order, rows = np.argsort(held_out.categories, kind="stable"), {}
    rank = np.empty(len(order), int)
    for category in np.unique(held_out.categories):
        members = np.flatnonzero(held_out.categories == category)
        rank[members] = np.arange(len(members))
    for number in sorted(order.tolist(), key=lambda n: int(rank[n])):
        name = held_out.captions[number].split(". keywords")[0][:40]
        if name not in rows and len(rows) < SHOWN:
            near = nearest(drawn[[number]], training.images)[0]
            rows[name] = [held_out.images[number], drawn[number], training.images[near]]
    return rows


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary in words."""
    shares = {name: Share(**value) for name, value in summary.items() if isinstance(value, dict)}
    return [
        ("drawings from held-out captions", f"{summary['drawings']}"),
        ("category seen as asked", str(shares["category_as_asked"])),
        ("the same for shuffled captions", str(shares["category_for_shuffled_captions"])),
        ("shuffles that do as well", f"{summary['shuffled_as_good_as_asked']:.2%}"),
        ("the classifier on real held-out drawings", f"{summary['classifier_accuracy_on_held_out']:.1%}"),
        (f"caption found among {summary['candidates']}", str(shares["caption_found"])),
        (
            "distance to the nearest training drawing",
            f"{summary['nearest_training_distance']:.1f} (held-out drawings "
            f"{summary['nearest_training_distance_of_held_out']:.1f})",
        ),
        (
            "copies of training drawings",
            f"{summary['copies']:.1%} (held-out drawings {summary['copies_among_held_out']:.1%})",
        ),
    ]


def _folder(data: DataConfig) -> str:
    if not isinstance(data.path, str) or data.sources:
        raise UserError("data.path: must be one folder of shards, from which drawings are read")
    return data.path


def _patterns(data: DataConfig) -> tuple[str, str]:
    if not isinstance(data.validation, str):
        raise UserError(f"data.validation: {data.validation!r}; drawings are held out by a pattern of shards")
    return data.train, data.validation


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.examples.evaluate_drawings",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", help="the recipe the run was started with")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--captions", type=int, default=200, metavar="N", help="held-out captions, at random (200)")
    add_sampling(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
