"""ARank of the layers of a multimodal LLM over questions about images: measured, kept in a file, drawn, and which
layers it proposes."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tqdm
import transformers

from pretrain.finetune.model_folder import open_dense
from pretrain.finetune.prompts import collate, encode, padding_id
from pretrain.finetune.questions import sample_questions
from zoo.adapt import arank
from zoo.adapt.proposal import Proposal, by_budget, by_threshold, flops_savings, skip_savings
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


def measure(model_name: str, data: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """ARank of a model's layers, as arank.json has it without a proposal.

    Args:
        settings: those of MEASURING.
    Raises:
        UserError: the model or the data cannot be used.
    """
    questions = sample_questions(data, settings["split"], settings["samples"], settings["seed"])
    model, processor = open_dense(model_name, settings["device"], settings["dtype"])
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


def propose(
    result: dict[str, Any],
    threshold: float | None,
    skip_ratio: float | None,
    flops: float | None,
    capacity: float,
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
        goal = f"skip ratio {skip_ratio:g} at capacity {capacity:g}"
        choices = by_budget(ranks, skip_savings(len(ranks), capacity), skip_ratio, goal, last_layer)
        made_by |= {"skip_ratio": skip_ratio, "capacity": capacity}
    elif flops is not None:
        goal = f"{flops:g} of dense FLOPs at capacity {capacity:g}"
        savings = flops_savings(layers, result["tokens"], result["image_tokens"], capacity)
        choices = by_budget(ranks, savings, 1 - flops, goal, last_layer)
        made_by |= {"flops": flops, "capacity": capacity}
    else:
        choices = [Proposal(False, f"rank_over_length {rank:.3f}; no threshold or budget given") for rank in ranks]
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
        raise UserError(f"--measured {path}: is not a file written by tools.arank")
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
