"""What a model trained on spoken digits has learned, by causal evaluation on takes it never heard.

    python -m tools.examples.evaluate_spoken_digits TAKES RECIPE [key.sub=value ...]

TAKES is what `make_spoken_digits` read. Asks the run's model to name every held-out take, by the likeliest of all
words, and to speak each word; a classifier fitted on real takes judges what it speaks. Writes `summary.json`,
`round_trip.png` (spectrograms of takes, and out of their positions), `spoken.png` and `spoken-WORD-N.wav` into the
run's `report/`.
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
from tools.examples.judge_spoken_digits import TEMPERATURE, Spoken, evaluate
from tools.examples.make_spoken_digits import takes
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.examples.evaluate_spoken_digits", description=__doc__.splitlines()[0])
    parser.add_argument("takes", type=Path, help="what make_spoken_digits read")
    parser.add_argument("recipe", help="the recipe the run was started with")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        trained = zoo.load(recipe.folder, imports=recipe.imports)
        found = evaluate(trained, list(takes(options.takes)), recipe.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run, summary = recipe.folder, found.summary | {"loss": causal_losses(recipe.folder)}
    report.write_summary(run, summary)
    report.draw_losses(run)
    write_sounds(run, found.spoken, trained.modalities)
    report.draw_images(found.round_trip, report.folder_of(run) / "round_trip.png", f"{run.name}: out of positions")
    report.print_table(f"{run.name}: {sum(p.numel() for p in trained.model.parameters()):,} parameters", table(summary))
    print(f"pictures, sounds and summary.json are in {report.folder_of(run)}")
    return 0


def causal_losses(run: Path) -> dict[str, float]:
    """The last causal validation loss by modality."""
    start = "eval/causal/loss/"
    values = report.last_evaluation(run)
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


def write_sounds(run: Path, spoken: Sequence[Spoken], modalities: Any) -> None:
    """A WAV file of everything spoken, and one picture of its spectrograms."""
    for number, each in enumerate(spoken):
        name = f"spoken-{each.word}-{number % 10}.wav"
        (report.folder_of(run) / name).write_bytes(modalities[each.modality].write(each.sound))
    rows: dict[str, list[Any]] = {}
    for each in spoken:
        rows.setdefault(each.word, []).append(each.picture)
    report.draw_images(rows, report.folder_of(run) / "spoken.png", f"{run.name}: spoken from words, T = {TEMPERATURE}")


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary in words."""
    low, high = summary["word_accuracy_interval"]
    rows = [
        (
            f"sound → word, {summary['held_out_takes']} held-out takes",
            f"{summary['word_accuracy']:.1%} right (95 %: {low:.1%} to {high:.1%})",
        )
    ]
    rows += [
        ("the classifier on real held-out takes", f"{summary['classifier_accuracy_on_held_out']:.1%}"),
        (
            "the same out of their positions",
            f"{summary['classifier_accuracy_on_held_out_as_positions']:.1%}; "
            f"{summary['positions_that_survive_a_round_trip']:.1%} of what they carry comes again",
        ),
    ]
    rows.append((f"word → sound, T = {TEMPERATURE}", f"{summary['spoken_agreement']:.1%} recognised as asked"))
    return rows + [(f"validation loss, {name}", f"{value:.3f} causal") for name, value in summary["loss"].items()]


if __name__ == "__main__":
    sys.exit(main())
