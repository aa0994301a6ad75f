"""Estimate what a pretraining takes on accelerators that are not here: memory a rank, communication, steps a day, days.

    python -m tools.plan RECIPE [key.sub=value ...] --accelerator h100 --count 256 [--tokens 1e12]

Nothing is run. Memory: weights, gradients and optimizer states by ZeRO's stage, activations as a micro-batch leaves
them on the meta device. Time: the model of `tools.plan.estimate`, whose `efficiency` is an assumption; docs/planning.md
compares it with published trainings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from pretrain import recipe as recipes
from pretrain.describe import blueprint
from pretrain.memory import SPARE, RankMemory
from pretrain.recipe import Recipe
from tools.describe.tree import count, size
from tools.plan.accelerators import KNOWN, Accelerator
from tools.plan.estimate import DAY, EFFICIENCY, OVERLAP, Step, estimate, flops_per_token
from tools.plan.layouts import CHECKPOINTING, STAGES, Layout, layouts, own
from tools.sweep.report import table
from zoo.config import UserError
from zoo.model import Model


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--accelerator", choices=sorted(KNOWN), default="h100")
    parser.add_argument("--count", type=int, default=8, metavar="N", help="ranks, one an accelerator (default 8)")
    parser.add_argument("--tokens", type=float, help="budget; default: the recipe's steps")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="of the peak (default %(default)s)")
    parser.add_argument("--overlap", type=float, default=OVERLAP, help="of the compute (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_intermixed_args(arguments)
    try:
        for name, low in (("count", 1), ("efficiency", 1e-6), ("overlap", 0.0)):
            if (value := getattr(options, name)) < low or (name != "count" and value > 1):
                raise UserError(
                    f"--{name}: {value} is out of range; give {'1 or more' if name == 'count' else 'a share'}"
                )
        recipe = recipes.load(options.recipe, options.overrides)
        model, accelerator = blueprint(recipe), KNOWN[options.accelerator]
        found = layouts(recipe, model, options.count)
        steps = {
            stage: estimate(recipe, model, accelerator, options.count, stage, options.efficiency, options.overlap)
            for stage in STAGES[recipe.train.precision]
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        told = [dataclasses.asdict(each) | {"memory": each.memory.facts()} for each in found]
        taken = {stage: dataclasses.asdict(step) for stage, step in steps.items()}
        print(json.dumps({"own": own(recipe, options.count), "layouts": told, "steps": taken}, indent=1))
    else:
        print(show(recipe, model, accelerator, options.count, found, steps, options.tokens))
    return 0


def show(
    recipe: Recipe,
    model: Model,
    accelerator: Accelerator,
    ranks: int,
    found: Sequence[Layout],
    steps: dict[int, Step],
    tokens: float | None,
) -> str:
    """The estimate as Markdown."""
    precision, checkpointing, stage = own(recipe, ranks)
    step = next(iter(steps.values()))
    budget = tokens or step.tokens * recipe.train.steps
    parameters = sum(p.numel() for p in model.parameters())
    return "\n\n".join(
        [
            f"{recipe.name}: {count(parameters)} parameters, {count(flops_per_token(recipe, model))} training FLOPs a "
            f"token, {count(step.tokens)} tokens a step; {ranks} × {accelerator.name}. An estimate: nothing has run.",
            f"Memory a rank, of {accelerator.memory / 1e9:.0f} GB; `!`: more than {1 - SPARE:.0%} of it. The recipe's "
            f"own is {precision}, checkpointing {checkpointing}, stage {stage}.",
            _memory(found, accelerator),
            _times(steps, precision, accelerator, ranks, budget),
        ]
    )


def _memory(found: Sequence[Layout], accelerator: Accelerator) -> str:
    lines = []
    for precision in STAGES:
        for name in CHECKPOINTING:
            row = [each.memory for each in found if (each.precision, each.checkpointing) == (precision, name)]
            cells = {held.zero_stage: _held(held, accelerator) for held in row}
            known = row[0].activations
            shown = ["unknown", ""] if known is None else [size(known.peak), size(known.logits)]
            lines.append([precision, name, *shown, *(cells.get(stage, "") for stage in STAGES["fp32"])])
    stages = (f"stage {stage}" for stage in STAGES["fp32"])
    return table(["precision", "checkpointing", "activations", "logits, if whole", *stages], lines)


def _held(held: RankMemory, accelerator: Accelerator) -> str:
    """All that a rank holds; with a sign where it does not fit."""
    text = size(held.peak) + (" + activations" if held.activations is None else "")
    return text + (" !" if held.peak > (1 - SPARE) * accelerator.memory else "")


def _times(steps: dict[int, Step], precision: str, accelerator: Accelerator, ranks: int, budget: float) -> str:
    """A line a stage."""
    lines = [
        [
            f"{stage}",
            size(step.bytes_sent),
            f"{step.communication:.3f}",
            f"{step.compute:.3f}",
            f"{step.seconds:.3f}",
            f"{step.tokens / step.seconds / ranks:,.0f}",
            f"{step.utilisation:.1%}",
            f"{DAY / step.seconds:,.0f}",
            f"{step.days(budget):.2f}",
        ]
        for stage, step in steps.items()
    ]
    heads = ["stage", "sent a step", "communication, s", "compute, s", "step, s", "tokens/s a rank", "of the peak"]
    text = (
        f"Time in {precision}, peak {accelerator.flops[precision] / 1e12:.0f} TFLOP/s; days for {count(budget)} tokens."
    )
    return f"{text}\n\n{table([*heads, 'steps a day', 'days'], lines)}"


if __name__ == "__main__":
    sys.exit(main())
