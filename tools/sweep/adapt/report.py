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
from tools.sweep.adapt.plan import Point, target_of
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.kind import Result
from tools.sweep.rows import Row, gather
from zoo.files import atomic_write


def write(config: SweepConfig, points: Sequence[Point], out: Path) -> list[Path]:
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


def results(config: SweepConfig, rows: Sequence[Row[Point]], times: dict[str, Any]) -> str:
    """One line an arm and target."""
    metric = METRICS[config.test.metric]
    kinds = list(dict.fromkeys(kind for row in rows for kind in _kinds(row)))
    heads = [
        "arm",
        "target",
        "layers",
        "capacity",
        "FLOPs",
        "before",
        "after",
        *kinds,
        "by threshold",
        "at FLOPs",
        "K/V",
        "prefill",
        "decoder's",
        "decode",
        "training",
    ]
    dense = [row for row in rows if target_of(row) == 1]
    seconds = statistics.mean(found) if dense and (found := dense[0].each(_seconds)) else None
    lines = [
        _cells(row, metric, kinds, times.get(f"{row.arm}-{row.setting}"), seconds, config.tolerance) for row in rows
    ]
    tested, first = (
        "/".join(map(str, sorted({result[when]["questions"] for row in rows for _, result in row.results}))) or "no"
        for when in ("after", "before")
    )
    base = Path(config.base)
    notes = [
        f"# {base.parent.name if base.name == MODEL else base.name} made cheaper",
        (
            f"{metric.explained}, on {tested} {config.test.split} questions; mean ± standard deviation over seeds "
            f"{', '.join(map(str, config.seeds))}, of tuning; the base is one. {metric.control(config, rows)}Before: "
            f"adapted, not yet tuned, on the first {first}. FLOPs: the decoder's prefill with its routers, measured, "
            "over dense; K/V: bytes of keys and values over dense. By threshold: one threshold, tuned on validation, "
            "in place of top-k (off target: there or here it misses the FLOPs by more than the tolerance). Prefill: "
            "milliseconds over dense (smallest to largest ratio of a round); decoder's: without the vision tower, and "
            "that over the FLOPs. Decode: time of a step over dense. Training: seconds of the steps over the dense "
            f"control's, {config.jobs} runs side by side. (void): the rule had no choice of layers. A random draw of "
            "tokens depends on their place alone when a model is judged: all images keep the same places."
        ),
    ]
    return "\n\n".join([*notes, *report.unfinished(rows), report.table(heads, lines), *report.problems(rows)])


def _cells(
    row: Row[Point],
    metric: Metric,
    kinds: Sequence[str],
    times: dict[str, Any] | None,
    seconds: float | None,
    tolerance: float,
) -> list[str]:
    counts = sorted({len(p.capacities) for p in row.points})
    shares = [share for p in row.points for share in p.capacities.values()]
    capacity = (
        ""
        if not shares
        else f"{min(shares):.3f}"
        if min(shares) == max(shares)
        else f"{min(shares):.2f}–{max(shares):.2f}"
    )
    void = " (void)" if all(p.void for p in row.points) else ""
    flops = row.each(lambda r: r["after"]["flops"])
    untrained = "" if any(p.train for p in row.points) or not flops else " (not tuned)"
    cells = [row.arm, f"{row.setting}", "–".join(map(str, counts)) + void, capacity, _mean(flops, "{:.3f}")]
    cells.append(metric.show(row.each(lambda r: metric.of(r["before"])), row.runs if target_of(row) < 1 else 1))
    cells.append(metric.show(row.each(lambda r: metric.of(r["after"])), row.runs) + untrained)
    cells += [metric.show(row.each(lambda r, kind=kind: r["after"]["kinds"].get(kind)), row.runs) for kind in kinds]
    judged = [result["threshold"] for _, result in row.results if "threshold" in result]
    off = sum(
        not each["validation"]["reached"] or abs(each["flops"] / target_of(row) - 1) > tolerance for each in judged
    )
    cells.append(metric.show([metric.of(each) for each in judged], row.runs))
    cells.append(_mean([each["flops"] for each in judged], "{:.3f}") + (f" ({off} off target)" if off else ""))
    cells.append(_mean(row.each(lambda r: r["after"]["keys_and_values"]), "{:.3f}"))
    if times is None or not flops:
        cells += ["", "", ""]
    else:
        prefill, decode = times["prefill"], times["decode"]
        alone = (prefill["ms"] - prefill["tower_ms"]) / (prefill["dense_ms"] - prefill["tower_ms"])
        cells.append(f"{prefill['ms']:.1f} / {prefill['dense_ms']:.1f} ms = {_ratio(prefill)}")
        cells.append(f"{alone:.2f} = {alone / statistics.mean(flops):.2f} × FLOPs")
        cells.append(f"{decode['ms']:.2f} / {decode['dense_ms']:.2f} ms = {_ratio(decode)}")
    own = row.each(_seconds)
    cells.append(f"{statistics.mean(own):.0f} s" if own else "")
    cells[-1] += f" = {statistics.mean(own) / seconds:.2f}" if own and seconds else ""
    return cells


def layers_of(rows: Sequence[Row[Point]]) -> str:
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


def _kinds(row: Row[Point]) -> list[str]:
    """Kinds of questions that the metric tells apart."""
    return [kind for _, result in row.results for kind in result["after"].get("kinds", {})]


def _seconds(result: Result) -> float | None:
    return result.get("training_seconds")


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.mean(values)) if values else ""


def _ratio(reading: dict[str, Any]) -> str:
    low, high = reading["spread"]
    return f"{reading['ratio']:.2f} ({low:.2f}–{high:.2f}{', machine busy' if reading['busy'] else ''})"
