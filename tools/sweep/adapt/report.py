"""What a sweep has found: tables in words and numbers, and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.finetune.task import MODEL
from tools.sweep import report
from tools.sweep.adapt import pictures
from tools.sweep.adapt.comparison import comparison
from tools.sweep.adapt.metrics import METRICS, Metric
from tools.sweep.adapt.plan import AdaptPoint, target_of
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.kind import Result
from tools.sweep.rows import ArmResults, gather
from zoo.files import atomic_write


def write(config: SweepConfig, points: Sequence[AdaptPoint], out: Path) -> list[Path]:
    """`results.md`, a picture of the metric by its name and `skip.png`, of what has been run; returns their paths."""
    rows, metric = gather(points, out), METRICS[config.test.metric]
    timing = out / "timing.json"
    times = json.loads(timing.read_text()) if timing.exists() else {}
    ranks = out / "arank.json"
    depth = len(json.loads(ranks.read_text())["layers"]) if ranks.exists() else 0
    text = "\n\n".join([results(config, rows, times), comparison(config, rows), layers_of(rows)]) + "\n"
    atomic_write(out / "results.md", text)
    drawn = pictures.draw_metric(metric, rows, out / f"{metric.name}.png")
    return [out / "results.md", drawn, pictures.draw_skip(rows, out / "skip.png", depth)]


# -------------------------------------------------------------------------------------------------------------- tables


HEADS = ("arm", "target", "layers", "capacity", "FLOPs", "before", "after")
MORE_HEADS = ("by threshold", "at FLOPs", "K/V", "prefill", "decoder's", "decode", "training")
"""Heads of the table, before and after those of the kinds of questions."""


def results(config: SweepConfig, rows: Sequence[ArmResults[AdaptPoint]], times: dict[str, Any]) -> str:
    """One line an arm and target."""
    metric = METRICS[config.test.metric]
    kinds = list(dict.fromkeys(kind for row in rows for kind in _kinds(row)))
    dense = [row for row in rows if target_of(row) == 1]
    seconds = statistics.mean(found) if dense and (found := dense[0].each(_seconds)) else None
    lines = [
        [
            *_answers(row, metric, kinds),
            *_by_threshold(row, metric, config.tolerance),
            _mean(row.each(lambda r: r["after"]["keys_and_values"]), "{:.3f}"),
            *_times(row, times.get(f"{row.arm}-{row.setting}")),
            _training(row, seconds),
        ]
        for row in rows
    ]
    base = Path(config.base)
    title = f"# {base.parent.name if base.name == MODEL else base.name} made cheaper"
    table = report.table([*HEADS, *kinds, *MORE_HEADS], lines)
    notes = [title, _explained(config, metric, rows), *report.unfinished(rows)]
    return "\n\n".join([*notes, table, *report.problems(rows)])


def _explained(config: SweepConfig, metric: Metric, rows: Sequence[ArmResults[AdaptPoint]]) -> str:
    """What the columns of the table are."""
    tested, first = (
        "/".join(map(str, sorted({result[when]["questions"] for row in rows for _, result in row.results}))) or "no"
        for when in ("after", "before")
    )
    return (
        f"{metric.explained}, on {tested} {config.test.split} questions; mean ± standard deviation over seeds "
        f"{', '.join(map(str, config.seeds))}, of tuning; the base is one. {metric.control(config, rows)}Before: "
        f"adapted, not yet tuned, on the first {first}. FLOPs: the decoder's prefill with its routers, measured, "
        "over dense; K/V: bytes of keys and values over dense. By threshold: one threshold, tuned on validation, "
        "in place of top-k (off target: there or here it misses the FLOPs by more than the tolerance). Prefill: "
        "milliseconds over dense (smallest to largest ratio of a round); decoder's: without the vision tower, and "
        "that over the FLOPs. Decode: time of a step over dense. Training: seconds of the steps over the dense "
        f"control's, {config.jobs} runs side by side. (void): the rule had no choice of layers. A random draw of "
        "tokens depends on their place alone when a model is judged: all images keep the same places."
    )


def _answers(row: ArmResults[AdaptPoint], metric: Metric, kinds: Sequence[str]) -> list[str]:
    """The cells of what is routed, and how well it answers under the rule that it was tuned with."""
    counts = sorted({len(p.capacities) for p in row.points})
    void = " (void)" if all(p.void for p in row.points) else ""
    flops = row.each(_flops)
    untrained = "" if any(p.train for p in row.points) or not flops else " (not tuned)"
    return [
        row.arm,
        row.setting,
        "–".join(map(str, counts)) + void,
        _range([share for p in row.points for share in p.capacities.values()]),
        _mean(flops, "{:.3f}"),
        metric.show(row.each(lambda r: metric.of(r["before"])), row.runs if target_of(row) < 1 else 1),
        metric.show(row.each(lambda r: metric.of(r["after"])), row.runs) + untrained,
        *(metric.show(row.each(lambda r, kind=kind: r["after"]["kinds"].get(kind)), row.runs) for kind in kinds),
    ]


def _by_threshold(row: ArmResults[AdaptPoint], metric: Metric, tolerance: float) -> list[str]:
    """The two cells of one threshold in place of top-k."""
    judged = [result["threshold"] for _, result in row.results if "threshold" in result]
    off = sum(
        not each["validation"]["reached"] or abs(each["flops"] / target_of(row) - 1) > tolerance for each in judged
    )
    flops = _mean([each["flops"] for each in judged], "{:.3f}") + (f" ({off} off target)" if off else "")
    return [metric.show([metric.of(each) for each in judged], row.runs), flops]


def _times(row: ArmResults[AdaptPoint], times: dict[str, Any] | None) -> list[str]:
    """The three cells of prefill, decoder and decoding."""
    flops = row.each(_flops)
    if times is None or not flops:
        return ["", "", ""]
    prefill, decode = times["prefill"], times["decode"]
    alone = (prefill["ms"] - prefill["tower_ms"]) / (prefill["dense_ms"] - prefill["tower_ms"])
    return [
        f"{prefill['ms']:.1f} / {prefill['dense_ms']:.1f} ms = {_ratio(prefill)}",
        f"{alone:.2f} = {alone / statistics.mean(flops):.2f} × FLOPs",
        f"{decode['ms']:.2f} / {decode['dense_ms']:.2f} ms = {_ratio(decode)}",
    ]


def _training(row: ArmResults[AdaptPoint], dense: float | None) -> str:
    """The cell of training: seconds, and over those of the dense control."""
    own = row.each(_seconds)
    over = f" = {statistics.mean(own) / dense:.2f}" if own and dense else ""
    return f"{statistics.mean(own):.0f} s{over}" if own else ""


def layers_of(rows: Sequence[ArmResults[AdaptPoint]]) -> str:
    """Which layers each run routed, and what its routers skipped and foresaw."""
    heads = ["run", "layers", "skipped of the image tokens", "routers right", "same as"]
    lines = []
    for row in rows:
        found = {point.name: result for point, result in row.results}
        for point in row.points:
            after = found.get(point.name, {}).get("after", {})
            skip = ", ".join(f"{share:.2f}" for share in after.get("skip", {}).values())
            taught = point.adapt is not None and point.adapt.get("auxiliary", {}).get("type", "none") != "none"
            right = after.get("routers", {}).get("accuracy") if taught else None
            layers, share = ", ".join(map(str, point.capacities)), "" if right is None else f"{right:.1%}"
            lines.append([point.name, layers, skip, share, point.same_as])
    return "## Layers\n\n" + report.table(heads, lines)


# ------------------------------------------------------------------------------------------------------------- numbers


def _kinds(row: ArmResults[AdaptPoint]) -> list[str]:
    """Kinds of questions that the metric tells apart."""
    return [kind for _, result in row.results for kind in result["after"].get("kinds", {})]


def _seconds(result: Result) -> float | None:
    return result.get("training_seconds")


def _flops(result: Result) -> float:
    return result["after"]["flops"]


def _range(shares: Sequence[float]) -> str:
    """A capacity, or the range of several."""
    if not shares:
        return ""
    low, high = min(shares), max(shares)
    return f"{low:.3f}" if low == high else f"{low:.2f}–{high:.2f}"


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.mean(values)) if values else ""


def _ratio(reading: dict[str, Any]) -> str:
    low, high = reading["spread"]
    return f"{reading['ratio']:.2f} ({low:.2f}–{high:.2f}{', machine busy' if reading['busy'] else ''})"
