"""How well a multimodal LLM, dense or with Mixture-of-Depths layers, answers questions about images, and what it costs.

    python -m tools.evaluate_answers MODEL DATA [--split test] [--samples N]
    python -m tools.evaluate_answers MODEL DATA --adapt RECIPE.yaml [adapt.key=value ...]

MODEL is a folder of a whole dense model (or its name on the hub; merge LoRA adapters into it first), or one of an
adapted model, as `zoo.adapt.save_adapted` and `pretrain.finetune` write it. DATA is a folder of JSON lines (`image,
question, answer`). `--adapt` makes layers of a dense MODEL Mixture-of-Depths layers, untuned, by the `adapt:` section
of a recipe. `--exchange-images` asks every question about other images: what is still answered right was not read off
its own.

Prints the loss of the right answers, the share of generated answers that are right, the decoder's FLOPs for a sample
with its answers as a share of the dense decoder's, and the share of image tokens that each routed layer skips.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.finetune.answering import Request, evaluated
from zoo.config import UserError

REQUESTED = [field.name for field in dataclasses.fields(Request)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        _check(options)
        result = evaluated(Request(**{name: vars(options)[name] for name in REQUESTED}))
        rows = table(result)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name:{width}}  {value}")
        if options.json is not None:
            write(result, options.json)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def write(result: Mapping[str, Any], path: Path) -> None:
    """Raises UserError where it cannot."""
    try:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); give another file") from None
    print(f"{path} is written")


def table(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `evaluated` found, in words."""
    values, counts = result["values"], result["answers"]
    total = sum(counts.values())
    rows = [("questions", str(result["questions"]) + (", about other images" if result["exchange_images"] else ""))]
    if "eval/loss" in values:
        loss = values["eval/loss"]
        rows.append(("loss", f"{loss:.4f} nats a token of the answers"))
        rows.append(("perplexity", f"{math.exp(min(loss, 700)):.4g}"))
    name, title = ("accuracy", "accuracy") if "eval/accuracy" in values else ("forced_accuracy", "accuracy in one pass")
    rows.append((title, _share(values[f"eval/{name}"], total)))
    rows += [
        (f"  {kind}", _share(values[f"eval/{name}/{kind}"], counts[kind])) for kind in sorted(filter(None, counts))
    ]
    rows.append(("decoder FLOPs / dense", f"{values['eval/flops_ratio']:.3f}"))
    if "eval/skip" in values:
        rows.append(("skipped", f"{values['eval/skip']:6.1%} of what could be, over routed layers"))
        layers = [name for name in values if name.startswith("eval/skip/")]
        rows += [(f"  layer {layer.rpartition('.')[2]:>2}", f"{values[layer]:6.1%}") for layer in layers]
    return rows


def _share(share: float, count: int) -> str:
    return f"{share:6.1%} ({round(share * count)} of {count})"


def _check(options: argparse.Namespace) -> None:
    for name in ("samples", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if options.overrides and options.adapt is None:
        raise UserError(f"{options.overrides[0]!r}: is a key of a recipe, and there is none; give --adapt RECIPE.yaml")
    if options.json is not None and (options.json.is_dir() or not options.json.parent.is_dir()):
        raise UserError(f"--json {options.json}: must be a file in a folder that exists")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.evaluate_answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of the model (or the name of a dense one on the hub)")
    parser.add_argument("data", type=Path, help="folder of .jsonl files and images")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="adapt.key=value", help="laid over the recipe of --adapt"
    )
    parser.add_argument("--split", default="test", help="which .jsonl (test)")
    parser.add_argument("--samples", type=int, metavar="N", help="the first N questions (all)")
    parser.add_argument("--batch", type=int, default=32, help="questions a forward pass (32)")
    parser.add_argument("--adapt", type=Path, metavar="RECIPE.yaml", help="adapt a dense MODEL by this, without tuning")
    parser.add_argument(
        "--no-generate",
        dest="generate",
        action="store_false",
        help="no generation: an answer is right where each of its tokens is the likeliest after the right ones",
    )
    parser.add_argument(
        "--exchange-images",
        action="store_true",
        help="ask about images of another question; those without any are left out",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures, unrounded")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 … (cuda where there is one)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
