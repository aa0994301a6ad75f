"""Start a run with more experts, untied weights or MoD layers from the weights of a trained one.

    python -m tools.upcycle OLD_RUN RECIPE [key.sub=value ...]

Writes the first weights into the new run's folder; `pretrain.train RECIPE` then starts from them. The learning rate
schedule starts anew, the data go on where the old run stopped (no document is repeated), the optimizer state is left
behind: moments of one weight say nothing about copies that will see other tokens.

Prints the loss on the first held-out rows before and after: at a capacity below one, or with a gate that is not 1, the
new model is another function than the old, and this is by how much (`--rows 0`: do not measure). Causal routing is bad
until the new auxiliary routers have learned.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from pretrain.data import open_data
from pretrain.evaluate import evaluate
from tools.describe.tree import count
from zoo.config import UserError
from zoo.upcycle import upcycle


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_run", type=Path, help="run folder of the trained model")
    parser.add_argument("recipe", help="of the new run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--rows", type=int, help="held-out rows on which to measure; default: the recipe's")
    options = parser.parse_intermixed_args(arguments)
    try:
        old_model, _ = run_folder.load_model(options.old_run)
        recipe = recipes.load(options.recipe, options.overrides)
        new_model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=recipe.seed)
        result = upcycle(old_model.state_dict(), new_model)
        start = run_folder.position(options.old_run)
        run_folder.save_initial(recipe.folder, run_folder.Initial(result.weights, start))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    copied = sum(result.weights[name].numel() for name in result.origin)
    fresh = sum(value.numel() for value in result.weights.values()) - copied
    print(
        f"{recipe.folder}: {count(copied)} weights from {options.old_run}, {count(fresh)} fresh (routers); data go on "
        f"at row {start.row:,}. Start it: python -m pretrain.train {options.recipe}"
    )
    rows = recipe.evaluate.rows if options.rows is None else options.rows
    if rows and recipe.data.validation is not None:
        new_model.load_state_dict(result.weights)
        before, after = (losses(model.eval(), recipe, rows) for model in (old_model, new_model))
        for name, loss in after.items():
            print(f"{name}: {before[name]:.4f} → {loss:.4f}" if name in before else f"{name}: {loss:.4f} after")
    return 0


def losses(model: zoo.Model, recipe: recipes.Recipe, rows: int) -> dict[str, float]:
    """Losses of `pretrain.evaluate.evaluate` on the first `rows` held-out rows, of data that have some."""
    data = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda line: None)
    assert data.validation is not None
    objective = zoo.build(
        "objective",
        recipe.objective,
        d_model=recipe.model.d_model,
        modalities=model.modalities,
        heads=recipe.model.own_heads,
    )
    values = evaluate(model, model, objective, data.validation, rows, recipe.train.micro_batch)
    return {name: value for name, value in values.items() if "/loss" in name}


if __name__ == "__main__":
    sys.exit(main())
