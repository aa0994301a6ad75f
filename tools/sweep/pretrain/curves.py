"""What a run has reported along its way, read from the `metrics.jsonl` of its trainings."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain import metrics
from pretrain.document_losses import path_of
from tools.sweep.pretrain.savings import Curve

AXES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training steps"}
"""What curves are drawn against, by the key in a line of metrics, and in words."""
CAUSAL, TOPK = "eval/causal/loss", "eval/topk/loss"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation, with what the run had used of each axis by then, earlier trainings included."""

    used: dict[str, float]
    """By the keys of AXES, and the `steps`."""
    values: dict[str, float]
    """The `eval/…` numbers."""
    documents: Path
    """Losses of single documents, where the run has kept them."""


def evaluations(trained: Sequence[Path]) -> list[Evaluation]:
    """Those of a run's trainings, in order.

    Args:
        trained: run folders; one that has not begun adds nothing.
    """
    found, before = [], dict.fromkeys(("steps", *AXES), 0.0)
    for folder in trained:
        lines = [{**line, "steps": line["step"]} for line in _lines(folder) if all(axis in line for axis in AXES)]
        for line in lines:
            values = {key: value for key, value in line.items() if key.startswith("eval/")}
            if values:
                used = {axis: before[axis] + line[axis] for axis in before}
                found.append(Evaluation(used, values, path_of(folder, line["step"])))
        if lines:
            before = {axis: before[axis] + lines[-1][axis] for axis in before}
    return found


def losses(values: Mapping[str, float], start: str = CAUSAL) -> dict[str, float]:
    """The whole loss among the `eval/…` numbers as "all", and that of each modality by its name; parts of a modality's
    are left out."""
    rest = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    names = {key.removeprefix("/") or "all": value for key, value in rest.items()}
    return {name: value for name, value in names.items() if not set(name) & set("/@")}


def causal_ones(found: Sequence[Evaluation], axis: str) -> list[Evaluation]:
    """Those that are points of a curve: causal, and past the beginning."""
    return [each for each in found if CAUSAL in each.values and each.used[axis] > 0]


def curves(found: Sequence[Evaluation], axis: str) -> dict[str, Curve]:
    """Causal validation loss against an axis, by modality and "all"; only what every causal evaluation has."""
    causal = [(each.used[axis], losses(each.values)) for each in causal_ones(found, axis)]
    if not causal:
        return {}
    names = [name for name in causal[0][1] if all(each.get(name, 0) > 0 for _, each in causal)]
    x = np.array([used for used, _ in causal])
    return {name: Curve(x, np.array([each[name] for _, each in causal])) for name in names}


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a run went, and what it held."""

    tokens_per_second: float
    """Median over the lines of its last training but the first, in which things are made and compiled."""
    memory: float
    """Bytes of the first rank at most."""


def speed(trained: Sequence[Path]) -> Speed | None:
    """None where nothing was logged."""
    lines = [line for folder in trained for line in _lines(folder) if "tokens_per_second" in line]
    if not lines:
        return None
    rates = [line["tokens_per_second"] for line in lines[1:] or lines]
    return Speed(statistics.median(rates), max(line.get("memory", 0) for line in lines))


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return metrics.read(path) if path.exists() else []
