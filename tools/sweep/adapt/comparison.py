"""Whether layers chosen by ARank lose less than others, in words and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from tools.sweep.adapt.metrics import METRICS, Metric
from tools.sweep.adapt.plan import AdaptPoint, target_of
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.chance import LEVEL, Difference, Scores, compare
from tools.sweep.report import table
from tools.sweep.rows import ArmResults

HEAD = "## Does ARank choose better layers?"
RIVALS = ("random", "alternate", "arank_high")
"""Rules of layers that ARank's choice is compared with."""


def comparison(config: SweepConfig, rows: Sequence[ArmResults[AdaptPoint]]) -> str:
    """Whether layers chosen by ARank lose less than others at the same FLOPs."""
    by = {(row.arm, target_of(row)): row for row in rows}
    arms, metric = config.arms, METRICS[config.test.metric]
    lines, sentences = [], []
    for name in (name for name, arm in arms.items() if arm.layers == "arank" and arm.train):
        for rival, arm in arms.items():
            if arm.layers not in RIVALS or arm.model_copy(update={"layers": "arank"}) != arms[name]:
                continue
            pooled: defaultdict[int, list[tuple[Scores, Scores]]] = defaultdict(list)
            for target in config.targets:
                pairs, same = paired(metric, by[name, target], by[rival, target])
                void = same == len(pairs)
                found = compare(pairs) if pairs else None
                cells = [f"{name} − {rival}", f"{target:g}", *_difference(found, metric), f"{len(pairs)}", f"{same}"]
                lines.append(cells)
                if found is not None and not void:
                    sentences.append(f"- At {target:g} of dense FLOPs against {rival}: {_verdict(found, metric)}")
                    for seed, each in pairs.items():
                        pooled[seed] += each
            if len(config.targets) > 1 and pooled:
                found = compare(pooled)
                sentences.append(f"- Over all targets with a choice against {rival}: {_verdict(found, metric)}")
    if not lines:
        return f"{HEAD}\n\nNo arm of this sweep differs from another in the rule of its layers alone."
    text = (
        f"Differences of runs that share the seed, with {LEVEL:.0%} intervals over seeds (Student's) and over "
        "questions; what lies within either is not shown. Runs that route the same layers are one run, and count as "
        f"no difference.{metric.interval}"
    )
    heads = [f"{metric.key} of", "target", f"difference, {metric.difference.unit}", "over seeds", "over questions"]
    heads += ["seeds", "of them the same layers"]
    return "\n".join([HEAD, "", text, "", table(heads, lines), "", *sentences])


def paired(
    metric: Metric, ours: ArmResults[AdaptPoint], theirs: ArmResults[AdaptPoint]
) -> tuple[dict[int, list[tuple[Scores, Scores]]], int]:
    """Scores after tuning of the seeds that both have, and how many of these route the same layers."""
    other = {point.seed: (point, result) for point, result in theirs.results}
    both = [(point, result, *other[point.seed]) for point, result in ours.results if point.seed in other]
    same = sum(mine.capacities.keys() == his.capacities.keys() for mine, _, his, _ in both)
    pairs = {point.seed: [(metric.questions(r["after"]), metric.questions(q["after"]))] for point, r, _, q in both}
    return pairs, same


def _difference(found: Difference | None, metric: Metric) -> list[str]:
    if found is None:
        return ["", "", ""]
    form = metric.difference
    by_seed = f"± {form(found.by_seed)}" if found.seeds > 1 else ""
    return [form(found.mean, "+"), by_seed, f"± {form(found.by_item)}"]


def _verdict(found: Difference, metric: Metric) -> str:
    form = metric.difference
    seen = f"{form(found.mean, '+')} {form.unit}, ± {form(found.by_seed)} over {found.seeds} seeds, ± "
    seen += f"{form(found.by_item)} over questions"
    return f"ARank's choice {metric.verdict(found.mean)} ({seen})." if found.shown else f"not shown ({seen})."
