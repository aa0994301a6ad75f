"""Let the modalities of a recipe learn from its shards, and save what they learn: `text.json`, `image.safetensors`.

    python -m tools.train_tokenizer RECIPE [key=value ...] --out FOLDER
    python -m tools.train_tokenizer --path FOLDER text.type=bpe text.vocab_size=4096 image.type=patches image.codes=512
    --out FOLDER

The files can be shared between data sets: name them in `modalities.text.path` and `modalities.image.path`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain import recipe as recipes
from pretrain.data.config import DataConfig
from pretrain.data.fitting import fit_and_save
from pretrain.recipe_file import overridden
from zoo.config import UserError
from zoo.modalities import parse_modalities


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="*",
        default=[],
        metavar="RECIPE [key=value ...]",
        help="its sections data and modalities are used; with --path: keys of the section modalities",
    )
    parser.add_argument("--path", help="folder of shards, in place of a recipe")
    parser.add_argument("--train", default="*train*.tar", help="pattern of the training shards inside --path")
    parser.add_argument("--out", type=Path, default=Path("tokenizers"), help="folder to write to (default: tokenizers)")
    options = parser.parse_intermixed_args(arguments)
    if not options.path and not options.words:
        parser.error("give either a RECIPE or --path FOLDER")
    try:
        if options.path:
            config = DataConfig(path=options.path, train=options.train, sequence_length=1)  # no row is made here
            modalities = parse_modalities(overridden({}, options.words))
        else:
            recipe = recipes.load(options.words[0], options.words[1:])
            config, modalities = recipe.data, recipe.modalities
        for file in fit_and_save(config, modalities, options.out, print):
            print(file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
