"""Validate a recipe without launching anything: python -m tools.check RECIPE [key.sub=value ...] [--ranks N]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pretrain import recipe as recipes
from pretrain.deepspeed_config import check_values
from pretrain.describe import blueprint
from pretrain.process_group import choose_device
from tools.describe.tree import count
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.check", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks to check the batch sizes for (default 1)")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        device = choose_device(recipe.train.device)
        config = recipes.launch_config(recipe, options.ranks)
        check_values(config)
        model = blueprint(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parameters = sum(p.numel() for p in model.parameters())
    accumulation = config["gradient_accumulation_steps"]
    print(
        f"{options.recipe}: valid. {count(parameters)} parameters, ZeRO stage {config['zero_optimization']['stage']}, "
        f"{recipe.train.precision} on {device}, {options.ranks} rank(s), {accumulation} micro-batch(es) a step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
