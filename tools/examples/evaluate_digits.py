"""What a model trained on the digits has learned, by causal evaluation on digits it never saw.

    python -m tools.examples.evaluate_digits RECIPE [key.sub=value ...]

Reads the run's weights, asks it to name the held-out digits and to draw each digit from its name, lets a classifier
fitted on real training digits judge the drawings, looks for copies of training images, prints one table and writes
`summary.json`, `samples.png` and `loss.png` into the run's `report/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zoo
from pretrain import recipe as recipes
from pretrain import report
from tools.examples.captions import add_sampling, sampling_of
from tools.examples.judge_digits import TEMPERATURE, evaluate
from tools.examples.make_digits import NAMES
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.examples.evaluate_digits", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="the recipe the run was started with")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    add_sampling(parser)
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        trained = zoo.load(recipe.folder, imports=recipe.imports)
        summary, drawings = evaluate(trained, recipe.seed, sampling_of(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = recipe.folder
    summary |= run_figures(run)
    report.write_summary(run, summary)
    report.draw_losses(run)
    rows = {name: list(drawings.images[drawings.digits == digit]) for digit, name in enumerate(NAMES)}
    report.draw_images(rows, report.folder_of(run) / "samples.png", f"{run.name}: drawn from captions")
    report.print_table(f"{run.name}: {sum(p.numel() for p in trained.model.parameters()):,} parameters", table(summary))
    print(f"pictures and summary.json are in {report.folder_of(run)}")
    return 0


def run_figures(run: Path) -> dict[str, Any]:
    """What the training itself reported last."""
    values, step = report.last_evaluation(run), report.last_step(run)
    loss = {
        modality: {
            routing: values[f"eval/{routing}/loss/{modality}"]
            for routing in ("causal", "topk")
            if f"eval/{routing}/loss/{modality}" in values
        }
        for modality in ("text", "image")
    }
    figures: dict[str, Any] = {
        "loss": loss,
        "tokens": step["tokens"],
        "seconds": step["seconds"],
        "training_flops": step["flops"],
    }
    if "eval/auxiliary/accuracy" in values:
        figures["router_accuracy"] = values["eval/auxiliary/accuracy"]
        figures["router_always_skip"] = values["eval/auxiliary/always_skip"]
        figures["flops_per_token"] = {
            "causal": values["eval/causal/flops_per_token"],
            "nominal": values["eval/nominal_flops_per_token"],
        }
    return figures


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary in words."""
    rows = [
        ("image → caption, held-out digits", f"{summary['image_to_caption_accuracy']:.1%} right"),
        ("caption → image", f"{summary['caption_to_image_agreement']:.1%} recognised as asked"),
        (
            "the classifier on real held-out digits",
            f"{summary['classifier_accuracy_on_held_out']:.1%}, as the model sees them "
            f"{summary['classifier_accuracy_on_held_out_as_tokens']:.1%}",
        ),
        ("distinct drawings", f"{summary['distinct_share']:.1%}"),
        (
            "copies of training images",
            f"{summary['training_copies']:.1%} (held-out digits {summary['held_out_copies']:.1%})",
        ),
        (
            "distance to the nearest training digit",
            f"{summary['nearest_training_distance']:.1f} (held-out digits "
            f"{summary['nearest_training_distance_of_held_out']:.1f})",
        ),
    ]
    if "caption_to_image_agreement_at_temperature_1" in summary:
        share = summary["caption_to_image_agreement_at_temperature_1"]
        rows.append((f"the same at temperature 1 instead of {TEMPERATURE}", f"{share:.1%}"))
    for modality, loss in summary["loss"].items():
        text = f"{loss['causal']:.3f} causal" + (f", {loss['topk']:.3f} top-k" if "topk" in loss else "")
        rows.append((f"validation loss, {modality}", text))
    if "router_accuracy" in summary:
        always = summary["router_always_skip"]
        rows.append(("auxiliary routers", f"{summary['router_accuracy']:.1%} accurate (always skipping: {always:.1%})"))
        used = summary["flops_per_token"]
        rows.append(("FLOPs a token", f"{used['causal']:,.0f} in causal routing, {used['nominal']:,.0f} nominal"))
    rows.append(("training", f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
