"""Measure how redundant each layer of a multimodal LLM is, and propose which ones to make Mixture-of-Depths layers.

    python -m tools.arank MODEL DATA --threshold 0.3
    python -m tools.arank MODEL DATA --skip-ratio 0.3 --capacity 0.5
    python -m tools.arank --measured arank.json --flops 0.7 --capacity 0.5

MODEL is a folder of Hugging Face weights with its processor. DATA is a folder of JSON lines (`image, question, answer`)
or of WebDataset shards. ARank is the numerical rank of attention maps over the prompt, divided by its length. Without
a threshold or a budget nothing is proposed; a later call proposes from the file of an earlier one.

Writes arank.json and a picture of it beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pretrain.finetune.arank import MEASURING, draw, measure, propose, read
from zoo.config import UserError


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        if options.measured is None:
            settings = {
                name: given if (given := getattr(options, name)) is not None else default
                for name, default in MEASURING.items()
            }
            result = measure(options.model, options.data, settings)
        else:
            result = read(options.measured)
        propose(result, options.threshold, options.skip_ratio, options.flops, options.capacity, options.last_layer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    picture = draw(result, options.out.with_suffix(".png"))
    for layer in result["layers"]:
        print(f"layer {layer['index']:3}  {'routed' if layer['chosen'] else 'dense '}  {layer['reason']}")
    print(f"proposed: {result['proposed']}\n{options.out} and {picture} are written")
    return 0


def _check(options: argparse.Namespace) -> None:
    given = [name for name in MEASURING if getattr(options, name) is not None]
    if options.measured is not None and (options.model or given):
        what = "MODEL" if options.model else f"--{given[0]}"
        raise UserError(f"{what} is of a new measurement, --measured of an earlier one; give one of them")
    if options.measured is None and options.data is None:
        raise UserError("MODEL and DATA are needed, or --measured")
    for name in ("samples", "batch", "heads"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.keep is not None:
        raise UserError(f"--keep is called --capacity now; write --capacity {options.keep}")
    if not 0 < options.capacity < 1:
        raise UserError(
            f"--capacity {options.capacity:g}: must be between 0 and 1, the share of image tokens a layer keeps"
        )
    for name in ("threshold", "skip_ratio", "flops"):
        if (value := getattr(options, name)) is not None and not 0 < value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: must be between 0 and 1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.arank", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="folder of the model (or its name on the hub)")
    parser.add_argument("data", nargs="?", type=Path, help="folder of .jsonl files or .tar shards, or a .jsonl file")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="propose anew from an earlier arank.json")
    parser.add_argument("--out", type=Path, default=Path("arank.json"), help="default: arank.json")
    rule = parser.add_mutually_exclusive_group()
    rule.add_argument("--threshold", type=float, metavar="T", help="route layers with rank / length below T")
    rule.add_argument("--skip-ratio", type=float, metavar="R", help="skip this share of image tokens, over all layers")
    rule.add_argument("--flops", type=float, metavar="F", help="leave this share of the decoder's prefill FLOPs")
    parser.add_argument("--capacity", type=float, default=0.5, help="share of image tokens a routed layer keeps (0.5)")
    parser.add_argument("--keep", help=argparse.SUPPRESS)
    parser.add_argument("--last-layer", action="store_true", help="the last layer may be routed too")
    new = parser.add_argument_group("measurement")
    new.add_argument("--samples", type=int, metavar="N", help="how many samples, drawn at random (50)")
    new.add_argument("--split", help="which .jsonl, or shards with this in their names (train)")
    new.add_argument("--batch", type=int, help="samples a forward pass (1)")
    new.add_argument("--seed", type=int, help="of the drawing of samples (0)")
    new.add_argument("--rtol", type=float, help="a singular value counts above rtol · the largest (0.01)")
    new.add_argument("--heads", type=int, metavar="N", help="look at N evenly spaced heads of each layer (all)")
    new.add_argument("--rows", choices=("all", "image"), help="rows of the maps: all, or of image tokens (all)")
    new.add_argument("--device", help="cpu, cuda, cuda:1 … (cuda where there is one)")
    new.add_argument("--dtype", choices=("auto", "float32", "float16", "bfloat16"), help="auto: the checkpoint's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
