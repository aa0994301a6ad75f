"""What a sweep has found: tables in words and numbers, and pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.adapt_sweep import pictures
from tools.adapt_sweep.plan import Point
from tools.adapt_sweep.rows import Result, Row, deviation, gather
from tools.adapt_sweep.settings import SweepConfig

RIVALS = ("random", "alternate", "arank_high")
"""Rules of layers that ARank's choice is compared with."""


def write(config: SweepConfig, points: Sequence[Point], out: Path) -> list[Path]:
    """`results.md`, `accuracy.png` and `skip.png`, of what has been run; returns their paths."""
    rows = gather(points, out)
    timing = out / "timing.json"
    times = json.loads(timing.read_text()) if timing.exists() else {}
    text = "\n\n".join([table(config, rows, times), comparison(config, rows), layers_of(rows)]) + "\n"
    (out / "results.md").write_text(text, encoding="utf-8")
    return [out / "results.md", pictures.draw_accuracy(rows, out / "accuracy.png"), pictures.draw_skip(rows, out / "skip.png")]


# -------------------------------------------------------------------------------------------------------------- tables


def table(config: SweepConfig, rows: Sequence[Row], times: dict[str, Any]) -> str:
    """One line an arm and target."""
    kinds = list(dict.fromkeys(kind for row in rows for _, result in row.results for kind in result["after"]["kinds"]))
    heads = ["arm", "target", "layers", "keep", "FLOPs", "before", "after", *kinds, "by threshold", "at FLOPs", "K/V",
             "prefill", "decoder's", "decode", "training"]  # fmt: skip
    dense = [row for row in rows if row.target == 1]
    seconds = statistics.mean(found) if dense and (found := dense[0].each(_seconds)) else None
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(_cells(row, kinds, times.get(f"{row.arm}-{row.target:g}"), seconds)) + " |")
    problems = [f"- {p.name}: not run, {p.problem}." for row in rows for p in row.points if p.problem]
    missing = [p.name for row in rows for p in row.points if not p.problem and p.name not in {q.name for q, _ in row.results}]
    tested = {result["after"]["questions"] for row in rows for _, result in row.results}
    notes = [
        f"# {Path(config.base).name} made cheaper",
        f"Accuracy: share of generated answers that are exactly right, on {'/'.join(map(str, sorted(tested))) or 'no'} "
        f"{config.test.split} questions; mean ± standard deviation over seeds {', '.join(map(str, config.seeds))}. "
        "FLOPs: the decoder's prefill with its routers, measured, over dense; K/V: bytes of keys and values over dense. "
        "Before: adapted, not yet tuned. By threshold: one threshold, tuned on validation, in place of top-k (off target: none "
        "reaches the FLOPs within the tolerance there). Prefill: "
        "milliseconds over dense (smallest to largest ratio of a round); decoder's: without the vision tower, and that "
        "over the FLOPs. Decode: time of a step over dense. Training: seconds of the steps over the dense control's, "
        f"{config.jobs} runs side by side. (void): the rule had no choice of layers.",
    ]
    if missing:
        notes.append(f"Not finished yet: {', '.join(missing)}.")
    return "\n\n".join([*notes, "\n".join(lines), *(["\n".join(problems)] if problems else [])])


def _cells(row: Row, kinds: Sequence[str], times: dict[str, Any] | None, seconds: float | None) -> list[str]:
    counts = sorted({len(p.keep) for p in row.points})
    shares = [share for p in row.points for share in p.keep.values()]
    keep = "" if not shares else f"{min(shares):.3f}" if min(shares) == max(shares) else f"{min(shares):.2f}–{max(shares):.2f}"
    void = " (void)" if all(p.void for p in row.points) else ""
    flops = row.each(lambda r: r["after"]["flops"])
    untrained = "" if any(p.train for p in row.points) or not flops else " (not tuned)"
    cells = [row.arm, f"{row.target:g}", "–".join(map(str, counts)) + void, keep, _mean(flops, "{:.3f}")]
    cells.append(_percent(row.each(lambda r: r["before"]["accuracy"])))
    cells.append(_percent(row.each(lambda r: r["after"]["accuracy"])) + untrained)
    cells += [_percent(row.each(lambda r, kind=kind: r["after"]["kinds"].get(kind))) for kind in kinds]
    judged = [result["threshold"] for _, result in row.results if "threshold" in result]
    off = sum(not each["validation"]["reached"] for each in judged)
    cells.append(_percent([each["accuracy"] for each in judged]))
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


def differences(ours: Row, theirs: Row) -> list[float]:
    """Accuracy of ours minus theirs, for each seed that both have."""
    other = {point.seed: result for point, result in theirs.results}
    return [
        result["after"]["accuracy"] - other[point.seed]["after"]["accuracy"]
        for point, result in ours.results
        if point.seed in other
    ]


def verdict(values: Sequence[float], name: str) -> str:
    """What differences between two arms, a seed each, show: a sentence."""
    if len(values) < 2:
        return f"Against {name}: {len(values)} seed{'s' * (len(values) != 1)} show nothing about chance."
    mean, error = statistics.mean(values), _error(values)
    said = f"{100 * mean:+.1f} points, standard error {100 * error:.1f} over {len(values)} seeds"
    if not any(values):
        return f"Against {name}: no difference at all ({said})."
    if abs(mean) < 2 * error:
        return f"Against {name}: not shown ({said})."
    better = "answers more questions" if mean > 0 else "answers fewer questions"
    return f"Against {name}: ARank's choice {better} ({said})."


def comparison(config: SweepConfig, rows: Sequence[Row]) -> str:
    """Whether layers chosen by ARank lose less than others at the same FLOPs."""
    by = {(row.arm, row.target): row for row in rows}
    arms = config.arms
    ours = [name for name, arm in arms.items() if arm.layers == "arank" and arm.train]
    lines, sentences = [], []
    for name in ours:
        for rival, arm in arms.items():
            twin = arm.layers in RIVALS and arm.model_copy(update={"layers": "arank"}) == arms[name]
            if not twin:
                continue
            pooled: list[float] = []
            for target in config.targets:
                mine, other = by[name, target], by[rival, target]
                values = differences(mine, other)
                sets = {p.seed: set(p.keep) for p in other.points}
                same = sum(set(p.keep) == sets.get(p.seed) for p in mine.points)
                void = same == len(mine.points)
                pooled += [] if void else values
                mean = f"{100 * statistics.mean(values):+.1f}" if values else ""
                error = f"{100 * _error(values):.1f}" if len(values) > 1 else ""
                lines.append(f"| {name} − {rival} | {target:g} | {mean} | {error} | {len(values)} | {same} |")
                if values and not void:
                    sentences.append(f"- At {target:g} of dense FLOPs. {verdict(values, rival)}")
                elif void:
                    said = f"Against {rival}: both route the same layers, no comparison."
                    sentences.append(f"- At {target:g} of dense FLOPs. {said}")
            if len(config.targets) > 1 and pooled:
                sentences.append(f"- Over all targets with a choice. {verdict(pooled, rival)}")
    if not lines:
        return "## Does ARank choose better layers?\n\nNo arm of this sweep differs from another in the rule of its layers alone."
    heads = "| accuracy of | target | mean difference, points | standard error | seeds | of them the same layers |"
    return "\n".join(["## Does ARank choose better layers?", "", heads, "|---|---|---|---|---|---|", *lines, "", *sentences])


def layers_of(rows: Sequence[Row]) -> str:
    """Which layers each run routed, and what its routers skipped and foresaw."""
    lines = ["## Layers", "", "| run | layers | skipped of the image tokens | routers right | same as |", "|---|---|---|---|---|"]
    for row in rows:
        found = {point.name: result for point, result in row.results}
        for point in row.points:
            after = found.get(point.name, {}).get("after", {})
            skip = ", ".join(f"{share:.2f}" for share in after.get("skip", {}).values())
            taught = point.adapt is not None and point.adapt.get("auxiliary", {}).get("type", "none") != "none"
            right = after.get("routers", {}).get("accuracy") if taught else None
            cells = [point.name, ", ".join(map(str, point.keep)), skip, "" if right is None else f"{right:.1%}", point.same_as]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- numbers


def _seconds(result: Result) -> float | None:
    return result.get("training_seconds")


def _error(values: Sequence[float]) -> float:
    return deviation(values) / math.sqrt(len(values))


def _mean(values: Sequence[float], form: str) -> str:
    return form.format(statistics.mean(values)) if values else ""


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * deviation(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


def _ratio(reading: dict[str, Any]) -> str:
    low, high = reading["spread"]
    return f"{reading['ratio']:.2f} ({low:.2f}–{high:.2f}{', machine busy' if reading['busy'] else ''})"
