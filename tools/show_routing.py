"""Draw which patches of an image each Mixture-of-Depths layer of an adapted multimodal LLM keeps.

    python -m tools.show_routing MODEL DATA --out FOLDER [--samples N]

MODEL is a folder that `zoo.adapt.save_adapted` or `pretrain.finetune` wrote. DATA is a folder of JSON lines (`image,
question, answer`) or of WebDataset shards. FOLDER gets one picture for each image, with a field for each routed layer
(skipped patches are dark), and skip_ratio.png: the share of image tokens that each layer skips, over all samples.

Only families whose image tokens are a square grid in reading order can be drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pretrain.finetune.model_folder import open_adapted
from pretrain.finetune.questions import sample_questions
from pretrain.finetune.routing_pictures import check_family, draw_questions
from zoo.config import UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.samples < 1:
            raise UserError(f"--samples {options.samples}: must be at least 1")
        model, processor = open_adapted(options.model, options.base, options.device)
        check_family(model, options.model)
        questions = sample_questions(options.data, options.split, options.samples, options.seed)
        title = f"{options.model.name}, {len(questions)} samples"
        drawn = draw_questions(model, processor, questions, title, options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for layer, (offered, skipped) in enumerate(zip(drawn.offered, drawn.skipped, strict=True)):
        print(f"layer {layer:3}  skips {skipped:6.1%}" if offered else f"layer {layer:3}  dense")
    print(f"{len(drawn.files)} pictures are written to {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.show_routing", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the adapted model")
    parser.add_argument("data", type=Path, help="folder of .jsonl files or .tar shards, or a .jsonl file")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the pictures go")
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="how many samples, drawn at random (8)")
    parser.add_argument(
        "--split", default="validation", help="which .jsonl, or shards with this in their names (validation)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing of samples (0)")
    parser.add_argument("--base", help="of adapters: where their base is, if not where it was")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (cuda where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
