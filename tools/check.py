"""Validate a recipe without launching anything.

    python -m tools.check RECIPE [key.sub=value ...] [--ranks N]
    python -m tools.check RECIPE --run

With --run every kind of layer is also built, small, and what blocks promise each other is tried out (docs/blocks.md);
exit code 1 where a promise is broken.
"""

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
from zoo.contract import examine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--ranks", type=int, default=1, help="number of ranks to check the batch sizes for (default 1)")
    parser.add_argument("--run", action="store_true", help="also build each kind of layer small, and try it out")
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
    return _try_out(recipe) if options.run else 0


def _try_out(recipe: recipes.Recipe) -> int:
    """Print what blocks keep of their promises; 1 where one is broken."""
    findings = examine(recipe.model, recipe.objective, recipe.bidirectional, recipe.kernels)
    for key in dict.fromkeys(finding.key for finding in findings):
        kept = [finding.promise for finding in findings if finding.key == key and not finding.fault]
        print(f"{key}: {', '.join(kept) or 'nothing'} as promised")
        for finding in findings:
            if finding.key == key and finding.fault:
                print(f"{key}: BROKEN: {finding.promise}: {finding.fault}")
    return int(any(finding.fault for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
