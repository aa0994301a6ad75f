"""Print the architecture a recipe assembles: parameters, FLOPs a token, memory a rank; nothing is allocated.

python -m tools.describe RECIPE [key.sub=value ...] [--ranks N] [--json]
python -m tools.describe RECIPE [key.sub=value ...] --data      the mixture of its data
python -m tools.describe FOLDER [--papers FILE]    a table of all recipes in it, as Markdown
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain import recipe as recipes
from pretrain.describe import blueprint, describe
from pretrain.recipe import Recipe
from tools.describe.data import data_facts, show_data
from tools.describe.papers import Papers, table
from tools.describe.tree import show
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.describe", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="or a folder of recipes, for a table")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--ranks", type=int, default=1, help="for the memory a rank (default 1)")
    parser.add_argument("--data", action="store_true", help="print the mixture of the data; they are tokenised first")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--papers", metavar="FILE", help="YAML of what papers print, for a folder's table")
    options = parser.parse_intermixed_args(arguments)
    try:
        (_folder if Path(options.recipe).is_dir() else _recipe)(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _recipe(options: argparse.Namespace) -> None:
    if options.papers:
        raise UserError(f"--papers: {options.recipe!r} is not a folder; papers stand beside the recipes of a folder")
    recipe = recipes.load(options.recipe, options.overrides)
    if options.data:
        found = data_facts(recipe)
        print(json.dumps(found, indent=1)) if options.json else show_data(found)
        return
    model = blueprint(recipe)
    facts = describe(recipe, model, options.ranks)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        show(recipe, model, facts)


def _folder(options: argparse.Namespace) -> None:
    every = [
        describe(r, blueprint(r), options.ranks, with_activations=False)
        for r in folder(options.recipe, options.overrides)
    ]
    print(json.dumps(every, indent=1) + "\n" if options.json else table(every, Papers.read(options.papers)), end="")


def folder(path: str, overrides: Sequence[str]) -> list[Recipe]:
    """The recipes of a folder, by name.

    Raises:
        UserError: there is none, or one is wrong.
    """
    files = sorted(Path(path).glob("*.yaml"))
    if not files:
        raise UserError(f"{path}: no *.yaml in this folder; give a folder of recipes")
    return [recipes.load(file, overrides) for file in files]


if __name__ == "__main__":
    sys.exit(main())
