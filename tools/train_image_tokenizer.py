"""Train an image tokenizer on the pictures of shards: an autoencoder with VQ or FSQ between.

    python -m tools.train_image_tokenizer RECIPE [key.sub=value ...]

Leaves `image.safetensors`, for a modality `{type: vq, path: …}`, metrics and `report/reconstructions.png`, originals
beside what their codes tell, in `runs/NAME`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import yaml

from pretrain import recipe_file
from pretrain.image_tokenizer import ImageTokenizerRecipe, train
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="such as recipes/image_tokenizers/vq.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        recipe = ImageTokenizerRecipe.parse(recipe_file.read(options.recipe, options.overrides))
        values = train(recipe)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    codes = recipe.network.quantizer.size
    print(
        f"held-out pictures: {values['eval/psnr']:.1f} dB PSNR; perplexity {values['eval/perplexity']:.1f} of {codes} "
        f"codes, {values['eval/used']:.1%} of them in use"
    )
    modality = recipe.modality.model_dump(mode="json", exclude={"max_megapixels"})
    line = yaml.safe_dump(modality, default_flow_style=True, sort_keys=False, width=999).strip()
    print(f"in a recipe:\n  image: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
