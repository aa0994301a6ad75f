"""Tokenise the data of a recipe beforehand, or one share of them on each of several machines.

    python -m tools.tokenize RECIPE [key.sub=value ...] [--part I/N]

Give the same recipe and the same `data.cache`, which the machines share, to each; shards that are there are not made
again.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from pretrain import recipe as recipes
from pretrain.data import tokenize_part
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N shares of the shards, from 1")
    options = parser.parse_intermixed_args(arguments)
    numbers = re.fullmatch(r"(\d+)/(\d+)", options.part)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        parser.error(f"--part: {options.part}; write it as 2/8, the second of eight shares")
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        count = tokenize_part(recipe.data, recipe.modalities, int(numbers[1]), int(numbers[2]), print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count:,} shards are tokenised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
