"""Pictures of a sweep: how well is answered against FLOPs, and what each layer skips."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tools.sweep.adapt.metrics import Metric
from tools.sweep.adapt.plan import AdaptPoint, target_of
from tools.sweep.rows import ArmResults, deviation


def draw_metric(metric: Metric, rows: Sequence[ArmResults[AdaptPoint]], path: Path) -> Path:
    """The metric after tuning against measured FLOPs: a line an arm, standard deviations over seeds, dense as a
    star."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(dict.fromkeys(row.arm for row in rows)):
        own = sorted((row for row in rows if row.arm == arm and row.results), key=target_of)
        if not own:
            continue
        x = [statistics.mean(row.each(lambda r: r["after"]["flops"])) for row in own]
        numbers = [row.each(lambda r: metric.number(metric.of(r["after"]))) for row in own]
        y, spread = [statistics.mean(each) for each in numbers], [deviation(each) for each in numbers]
        marker, style = ("*", "") if target_of(own[-1]) == 1 else ("o", "-" if own[0].points[0].train else "--")
        color = "black" if marker == "*" else f"C{number % 10}"
        axes.errorbar(
            x,
            y,
            yerr=spread,
            marker=marker,
            linestyle=style,
            color=color,
            capsize=2,
            label=arm,
            markersize=12 if marker == "*" else 5,
        )
    axes.set(
        xlabel="decoder FLOPs of a prompt / dense", ylabel=metric.name + ("" if metric.higher else " (lower is better)")
    )
    axes.grid(alpha=0.3)
    if any(row.results for row in rows):
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    return path


def draw_skip(rows: Sequence[ArmResults[AdaptPoint]], path: Path, depth: int = 0) -> Path:
    """Share of candidates skipped in each layer, mean over seeds: a panel a target, a line of squares an arm.

    Args:
        depth: layers to show at least; those after the last routed one are known to who has opened the model.
    """
    from matplotlib.figure import Figure

    targets = sorted({target_of(row) for row in rows if target_of(row) < 1}, reverse=True) or [1.0]
    arms = list(dict.fromkeys(row.arm for row in rows if target_of(row) < 1))
    depth = max(
        depth, 1 + max((layer for row in rows for point in row.points for layer in point.capacities), default=0)
    )
    figure = Figure(figsize=(1 + 0.45 * depth * len(targets), 1.5 + 0.35 * max(len(arms), 1)), layout="constrained")
    panels = figure.subplots(1, len(targets), squeeze=False)[0]
    image = None
    for axes, target in zip(panels, targets, strict=True):
        values = [[0.0] * depth for _ in arms]
        for row in rows:
            for _, result in row.results if target_of(row) == target and row.arm in arms else ():
                for layer, share in result["after"]["skip"].items():
                    values[arms.index(row.arm)][int(layer.rpartition(".")[2])] += share / len(row.results)
        image = axes.imshow(values or [[0.0] * depth], vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=f"{target:g} of dense FLOPs", xlabel="layer", xticks=range(depth))
        axes.set_yticks(range(len(arms)), arms if axes is panels[0] else [""] * len(arms), fontsize="small")
    assert image is not None
    figure.colorbar(image, ax=list(panels), label="skipped")
    figure.savefig(path, dpi=120)
    return path
