"""Write the documents of any source as WebDataset shards of ours, once, for training at full speed.

    python -m tools.make_shards SOURCE OUT type=captions [key=value ...] [--hold-out 0.01] [--recipe RECIPE]

SOURCE is what stands in `path` of a source (docs/data.md): a file, a folder, a URL, `pipe:COMMAND`, braces. The keys
are those of the source's type. OUT gets `train-00000.tar`, …, `val-00000.tar`, …, `summary.json` and
`contact_sheet.png`, a look at some of the documents. It is there as a whole or not at all, also after a kill, when the
same command begins anew; and it is the same for any number of workers. Which documents are held out is decided by a
hash of what they hold, so that equal ones are on one side.

With a recipe, tokens are counted, and the sheet shows pictures as its modalities see them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretrain import recipe as recipes
from pretrain.data.sources import SourceConfig
from pretrain.recipe_file import overridden
from tools.make_shards.measure import Measure
from tools.make_shards.run import make_shards
from zoo.config import UserError
from zoo.registry import parse_block


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="path of the source")
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="type, and other keys of the source")
    parser.add_argument(
        "--hold-out", type=float, default=0.01, help="share of held-out documents (default: %(default)s)"
    )
    parser.add_argument("--recipe", help="its modalities count tokens and are drawn on the sheet")
    parser.add_argument("--megabytes", type=int, default=256, help="size of a shard, about (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    options = parser.parse_intermixed_args(arguments)
    try:
        if not 0 <= options.hold_out < 1:
            raise UserError(f"--hold-out: {options.hold_out}: must be at least 0 and below 1")
        config = parse_block("source", overridden({"path": options.source}, options.keys), "source")
        assert isinstance(config, SourceConfig)
        measure = Measure.of(recipes.load(options.recipe).modalities if options.recipe else None)
        if measure.missing:
            print(f"no tokens are counted: {', '.join(measure.missing)} is still to learn, see tools.train_tokenizer")
        summary = make_shards(config, options.out, measure, options.hold_out, options.megabytes, options.workers)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(summary.lines()))
    print(f"{options.out}: look at contact_sheet.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
