"""What merged models say of mixtures, and how well they foretell the ranks of really trained ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from tools.mixture.run import Found, Tried
from tools.mixture.settings import MixtureConfig
from tools.sweep.report import table
from zoo.files import atomic_write

LEVEL, DRAWS = 0.95, 2000
BEST = 10
"""Lines of the table of merged mixtures."""


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Spearman's rank correlation, and its percentile interval over the mixtures; NaN where there is none."""

    correlation: float
    low: float
    high: float


def agreement(ours: Sequence[float], theirs: Sequence[float]) -> Agreement:
    """How alike two lists of scores rank the same mixtures, with a bootstrap over these."""
    pairs = np.array([ours, theirs], float)
    count = pairs.shape[1]
    if count < 3:
        return Agreement(math.nan, math.nan, math.nan)
    draws = np.random.default_rng(0).integers(0, count, (DRAWS, count))
    found = [_spearman(pairs[:, draw]) for draw in draws]
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Agreement(_spearman(pairs), float(low), float(high))


def _spearman(pairs: np.ndarray) -> float:
    """NaN where one list is constant."""
    if (np.ptp(pairs, axis=1) == 0).any():
        return math.nan
    return float(stats.spearmanr(*pairs).statistic)


def score(tried: Tried, judge: dict[str, float]) -> float:
    """What mixtures are ranked by: the mean of the sources' losses, by the weights of `judge`."""
    weights = judge or dict.fromkeys(tried.losses, 1.0)
    return sum(weight * tried.losses[name] for name, weight in weights.items()) / sum(weights.values())


def write(config: MixtureConfig, found: Found, out: Path) -> list[Path]:
    """`report.md`, and where mixtures were checked `ranks.png`; returns their paths."""
    names = list(found.start.losses)
    ranked = sorted(found.merged, key=lambda each: score(each, config.judge))
    judged = config.judge or dict.fromkeys(names, 1.0)
    text = [
        "# Mixtures of data by merged models",
        "Losses are causal validation losses in nats a token on each source; mixtures are ranked by their mean, "
        f"weights {', '.join(f'{name} {weight:g}' for name, weight in judged.items())}. A merged model ranks mixtures; "
        "its loss is not that of a model trained on them.",
        "## The best merged models",
        table(_heads(names), [_line(each, names, config) for each in ranked[:BEST]]),
        f"The start, trained for {config.start_steps} steps: {score(found.start, config.judge):.4f}. Models of one "
        "source alone are on the grid with weight 1.",
    ]
    written = [out / "report.md"]
    if found.trained:
        text += ["## Really trained on", _checked(found, names, config), *_agreements(found, names, config)]
        written.append(_draw(found, config, out / "ranks.png"))
    atomic_write(out / "report.md", "\n\n".join(text) + "\n")
    return written


def _heads(names: Sequence[str]) -> list[str]:
    return [*(f"weight of {name}" for name in names), *(f"loss, {name}" for name in names), "mean"]


def _line(tried: Tried, names: Sequence[str], config: MixtureConfig) -> list[str]:
    weights = [f"{tried.weights[name]:.3g}" for name in names]
    return [*weights, *(f"{tried.losses[name]:.4f}" for name in names), f"{score(tried, config.judge):.4f}"]


def _checked(found: Found, names: Sequence[str], config: MixtureConfig) -> str:
    lines = [
        [*_line(real, names, config), f"{score(merge, config.judge):.4f}"]
        for real, merge in zip(found.trained, found.stand_ins, strict=True)
    ]
    return table([*_heads(names), "mean of the merge"], lines)


def _agreements(found: Found, names: Sequence[str], config: MixtureConfig) -> list[str]:
    both = (found.stand_ins, found.trained)
    rows = [("mean", agreement(*([score(each, config.judge) for each in side] for side in both)))]
    rows += [(name, agreement(*([each.losses[name] for each in side] for side in both))) for name in names]
    cells = [
        [n, f"{a.correlation:.2f}", f"{a.low:.2f} to {a.high:.2f}"] for n, a in rows if not math.isnan(a.correlation)
    ]
    if not cells:
        return ["Fewer than three mixtures have no rank correlation."]
    said = f"Rank correlation of merged and trained models over {len(found.trained)} mixtures, bootstrap over these:"
    return [said, table(["ranked by", "Spearman's ρ", f"{LEVEL:.0%} interval"], cells)]


def _draw(found: Found, config: MixtureConfig, path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    x, y = ([score(each, config.judge) for each in side] for side in (found.stand_ins, found.trained))
    axes.plot(x, y, "o")
    axes.set(xlabel="mean loss of the merged model", ylabel="mean loss of the trained model")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
