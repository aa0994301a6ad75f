"""Start a run with more experts, untied weights, MoD layers or modalities from the weights of a trained one.

    python -m tools.upcycle OLD_RUN RECIPE [key.sub=value ...]

Writes the first weights into the new run's folder; `pretrain.train RECIPE` then starts from them. The learning rate
schedule starts anew, the data go on where the old run stopped (no document is repeated), the optimizer state is left
behind: moments of one weight say nothing about copies that will see other tokens. Ids must mean what they meant: other
tokenizers are refused, also those with as many ids. The recipe may have modalities that OLD_RUN has not, such as images
that are denoised beside the text of a language model: their ids, stems and heads are new.

Prints the loss on the first held-out rows before and after: at a capacity below one, or with a gate that is not 1, the
new model is another function than the old, and this is by how much (`--rows 0`: do not measure). Causal routing is bad
until the new auxiliary routers have learned.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain import recipe as recipes
from pretrain.upcycle import begin, losses
from tools.describe.tree import count
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.upcycle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old_run", type=Path, help="run folder of the trained model")
    parser.add_argument("recipe", help="of the new run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--rows", type=int, help="held-out rows on which to measure; default: the recipe's")
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        begun = begin(options.old_run, recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "pretrain.train", options.recipe, *options.overrides])
    print(
        f"{recipe.folder}: {count(begun.copied)} weights from {options.old_run}, {count(begun.fresh)} fresh "
        f"({'routers' if begun.old.modalities == begun.new.modalities else 'routers, new modalities'}); "
        f"data {'go on' if begun.row else 'begin'} at row {begun.row:,}. Start it: {command}"
    )
    rows = recipe.evaluate.rows if options.rows is None else options.rows
    same = begun.old.modalities == begun.new.modalities  # a model cannot be asked about modalities that it has not
    before = losses(begun.old, recipe, begun.data, rows) if same else {}
    after = losses(begun.new, recipe, begun.data, rows)
    for name, loss in after.items():
        print(f"{name}: {before[name]:.4f} → {loss:.4f}" if name in before else f"{name}: {loss:.4f} after")
    return 0


if __name__ == "__main__":
    sys.exit(main())
