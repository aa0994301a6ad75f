"""Measure how redundant each layer of a multimodal LLM is, and propose which ones to make Mixture-of-Depths layers.

    python -m tools.arank MODEL DATA --threshold 0.3
    python -m tools.arank MODEL DATA --skip-ratio 0.3 --keep 0.5
    python -m tools.arank --measured arank.json --flops 0.7 --keep 0.5

MODEL is a folder of Hugging Face weights with its processor. DATA is a folder of JSON lines (`image, question, answer`)
or of WebDataset shards. ARank is the numerical rank of attention maps over the prompt, divided by its length. Without
a threshold or a budget nothing is proposed; a later call proposes from the file of an earlier one.

Writes arank.json and a picture of it beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pretrain.finetune.prompts import collate, encode, padding_id
from pretrain.finetune.questions import sample_questions
from zoo.adapt.proposal import Choice, by_budget, by_threshold, flops_savings, skip_savings
from zoo.config import UserError

MEASURING = {
    "samples": 50,
    "split": "train",
    "batch": 1,
    "seed": 0,
    "rtol": 1e-2,
    "heads": None,
    "rows": "all",
    "device": "auto",
    "dtype": "auto",
}
"""Options of the measurement, with their defaults."""


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        _check(options)
        if options.measured is None:
            settings = {
                name: given if (given := getattr(options, name)) is not None else default
                for name, default in MEASURING.items()
            }
            result = measured(options.model, options.data, settings)
        else:
            result = read(options.measured)
        propose(result, options.threshold, options.skip_ratio, options.flops, options.keep, options.last_layer)
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


def measured(model_name: str, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """ARank of a model's layers, as arank.json has it without a proposal.

    Args:
        settings: those of MEASURING.
    Raises:
        UserError: the model or the data cannot be used.
    """
    import torch
    import tqdm
    import transformers

    from zoo.adapt import arank

    questions = sample_questions(data, settings["split"], settings["samples"], settings["seed"])
    model, processor = open_model(model_name, settings["device"], settings["dtype"])
    depth = len(arank.parts(model).layers)
    with tqdm.tqdm(total=depth * len(questions), desc="measuring", unit="map", disable=None) as bar:
        found = arank.measure(
            model,
            _batches(questions, processor, settings["batch"]),
            rtol=settings["rtol"],
            heads=settings["heads"],
            rows=settings["rows"],
            progress=bar.update,
        )
    return {
        "layers": found.layers(),
        "tokens": list(found.tokens),
        "image_tokens": list(found.image_tokens),
        "settings": settings
        | {
            "model": model_name,
            "data": str(data),
            "samples": len(questions),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "attention_dtype": found.dtype,
            "diagonal": "zero",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        },
    }


def open_model(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A multimodal model in evaluation, and its processor.

    Raises:
        UserError: it cannot be opened, lacks weights, or knows no images.
    """
    import transformers

    from pretrain.finetune.model_folder import cannot_open, open_folder
    from zoo.adapt.save import check_complete

    _, processor = open_folder(name)
    kind = transformers.AutoModelForImageTextToText
    try:
        model, loaded = kind.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except Exception as error:  # Transformers raises anything for a model it does not take
        raise cannot_open(name, error) from None
    check_complete(repr(name), loaded)
    return on_device(model, device).eval(), processor


def on_device(model: Any, device: str) -> Any:
    """The model, moved to what --device names.

    Raises:
        UserError: it is not there.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: is not to be had ({error})") from None


def propose(
    result: dict[str, Any],
    threshold: float | None,
    skip_ratio: float | None,
    flops: float | None,
    keep: float,
    last_layer: bool,
) -> None:
    """Write the proposal into `result`: `chosen` and `reason` of each layer, `proposed`, `settings.proposal`."""
    layers = result["layers"]
    ranks = [layer["rank_over_length"] for layer in layers]
    made_by: dict[str, Any] = {"last_layer": last_layer}
    if threshold is not None:
        choices = by_threshold(ranks, threshold, last_layer)
        made_by["threshold"] = threshold
    elif skip_ratio is not None:
        goal = f"skip ratio {skip_ratio:g} at keep {keep:g}"
        choices = by_budget(ranks, skip_savings(len(ranks), keep), skip_ratio, goal, last_layer)
        made_by |= {"skip_ratio": skip_ratio, "keep": keep}
    elif flops is not None:
        goal = f"{flops:g} of dense FLOPs at keep {keep:g}"
        savings = flops_savings(layers, result["tokens"], result["image_tokens"], keep)
        choices = by_budget(ranks, savings, 1 - flops, goal, last_layer)
        made_by |= {"flops": flops, "keep": keep}
    else:
        choices = [Choice(False, f"rank_over_length {rank:.3f}; no threshold or budget given") for rank in ranks]
    for layer, choice in zip(layers, choices, strict=True):
        layer["chosen"], layer["reason"] = choice.chosen, choice.reason
    result["proposed"] = [layer["index"] for layer in layers if layer["chosen"]]
    result["settings"]["proposal"] = made_by


def read(path: Path) -> dict[str, Any]:
    """The arank.json of an earlier call.

    Raises:
        UserError: it is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        whole = {"layers", "tokens", "image_tokens", "settings"} <= set(result)
        whole = whole and all({"rank_over_length", "weights", "width"} <= set(layer) for layer in result["layers"])
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--measured {path}: cannot be read ({error})") from None
    if not whole:
        raise UserError(f"--measured {path}: is no file written by this command")
    return result


def draw(result: dict[str, Any], path: Path) -> Path:
    """Bars of rank_over_length with standard errors over samples; chosen layers in colour, the threshold as a line."""
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    layers, settings = result["layers"], result["settings"]
    figure = Figure(figsize=(max(5.0, 0.3 * len(layers) + 2), 3.5), layout="constrained")
    axes = figure.subplots()
    colors = ["C1" if layer["chosen"] else "0.7" for layer in layers]
    heights = [layer["rank_over_length"] for layer in layers]
    axes.bar(range(len(layers)), heights, color=colors, yerr=[layer["stderr"] or 0.0 for layer in layers], capsize=2)
    legend: list[Artist] = [Patch(color="C1", label="routed"), Patch(color="0.7", label="dense")]
    threshold = settings["proposal"].get("threshold")
    if threshold is not None:
        legend.append(axes.axhline(threshold, color="C3", linestyle="--", label=f"threshold {threshold:g}"))
    title = f"{Path(settings['model']).name}, {settings['samples']} samples, rtol {settings['rtol']:g}"
    axes.set(xlabel="layer", ylabel="rank / length", title=title, xlim=(-0.6, len(layers) - 0.4))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(handles=legend)
    figure.savefig(path, dpi=120)
    return path


def _batches(questions: Sequence[Any], processor: Any, size: int) -> Iterator[dict[str, Any]]:
    padding = padding_id(processor)
    for first in range(0, len(questions), size):
        yield collate([encode(each, processor, answers=False) for each in questions[first : first + size]], padding)


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
    if not 0 < options.keep < 1:
        raise UserError(f"--keep {options.keep:g}: must be between 0 and 1, the share of image tokens a layer keeps")
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
    parser.add_argument("--keep", type=float, default=0.5, help="share of image tokens a routed layer keeps (0.5)")
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
