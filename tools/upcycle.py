"""Start a run with more experts, untied weights or MoD layers from the weights of a trained one.

    python -m tools.upcycle OLD_RUN RECIPE [key.sub=value ...]

Writes the first weights into the new run's folder; `pretrain.train RECIPE` then starts from them. The learning rate
schedule starts anew, the data go on where the old run stopped (no document is repeated), the optimizer state is left
behind: moments of one weight say nothing about copies that will see other tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from tools.describe import count
from zoo.config import UserError
from zoo.upcycle import upcycle


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_run", type=Path, help="run folder of the trained model")
    parser.add_argument("recipe", help="of the new run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        old_model, _ = run_folder.load_model(options.old_run)
        recipe = recipes.load(options.recipe, options.overrides)
        new_model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=recipe.seed)
        result = upcycle(old_model.state_dict(), new_model.state_dict())
        start = run_folder.position(options.old_run)
        run_folder.save_initial(recipe.folder, result.weights, start)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    copied = sum(result.weights[name].numel() for name in result.origin)
    fresh = sum(value.numel() for value in result.weights.values()) - copied
    print(
        f"{recipe.folder}: {count(copied)} weights from {options.old_run}, {count(fresh)} fresh (routers); data go on "
        f"at row {start['row']:,}. Start it: python -m pretrain.train {options.recipe}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
