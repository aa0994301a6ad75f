"""Train the tokenizers of a recipe or a folder of shards, and save them: `text.json` and `image.safetensors`.

    python -m tools.train_tokenizer RECIPE [key=value ...] --out FOLDER
    python -m tools.train_tokenizer --path FOLDER --vocab-size 4096 --image-size 32 --patch 4 --codes 512
    --out FOLDER

The files can be shared between data sets: name them in `data.text.path` and `data.image.path`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.data.cache import cache_folder
from pretrain.data.config import DataConfig
from pretrain.data.fitting import SUFFIX, fit_tokenizers
from pretrain.data.index import list_shard
from pretrain.data.shards import find_shards
from zoo.config import UserError
from zoo.modalities import BytesConfig


def train(config: DataConfig, out: Path) -> list[Path]:
    """Train every tokenizer of `config` that can be trained on its training shards.

    Returns:
        the files written, in the order of the modalities.
    Raises:
        UserError: the shards cannot be read, or nothing is to be trained.
    """
    folder = Path(config.path)
    cache = cache_folder(folder, config.cache)
    listings = [list_shard(shard, cache) for shard in find_shards(folder, config.train, "data.train")]
    modalities = [name for name, tokenizer in config.tokenizers.items() if not isinstance(tokenizer, BytesConfig)]
    if not modalities:
        raise UserError("data.text.type: 'bytes' needs no training and there is no data.image; nothing to do")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for modality, tokenizer in fit_tokenizers(config, listings, modalities, print).items():
        files.append(out / f"{modality}{SUFFIX[modality]}")
        tokenizer.save(files[-1])
    return files


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", metavar="RECIPE [key=value ...]", help="its data section is used")
    parser.add_argument("--path", help="folder of shards, in place of a recipe")
    parser.add_argument("--train", default="*train*.tar", help="pattern of the training shards inside --path")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids of the text tokenizer")
    parser.add_argument("--image-size", type=int, default=32, help="side of an image in pixels")
    parser.add_argument("--patch", type=int, default=4, help="side of a patch in pixels")
    parser.add_argument("--codes", type=int, default=512, help="ids of the image tokenizer; 0 for text alone")
    parser.add_argument("--channels", type=int, default=3, help="3 for colour, 1 for grey")
    parser.add_argument("--out", type=Path, default=Path("tokenizers"), help="folder to write to (default: tokenizers)")
    options = parser.parse_args(arguments)
    if bool(options.recipe) == bool(options.path):
        parser.error("give either a RECIPE or --path FOLDER")
    try:
        for file in train(_config(options), options.out):
            print(file)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _config(options: argparse.Namespace) -> DataConfig:
    if options.recipe:
        from pretrain.recipe import load  # only here, so that --path works where no recipe can be loaded

        return load(options.recipe[0], options.recipe[1:]).data
    image = None
    if options.codes:
        image = {
            "type": "patches",
            "image_size": options.image_size,
            "patch": options.patch,
            "codes": options.codes,
            "channels": options.channels,
        }
    longest = 4 + max(1, options.image_size) ** 2  # no row is made here; any image fits
    return DataConfig.parse(
        {
            "path": options.path,
            "train": options.train,
            "text": {"type": "bpe", "vocab_size": options.vocab_size},
            "image": image,
            "sequence_length": longest,
        },
        "data",
    )


if __name__ == "__main__":
    sys.exit(main())
