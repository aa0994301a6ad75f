"""What a comparison of pretrainings says in numbers: tables, each with what its columns are."""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Sequence

from tools.describe.tree import count, size
from tools.sweep.pretrain import savings
from tools.sweep.pretrain.curves import AXES, CAUSAL, TOPK, losses
from tools.sweep.pretrain.savings import Interval, Saving, Share
from tools.sweep.pretrain.study import Run, Study

SHORT = {"tokens": "tokens", "flops": "FLOPs", "seconds": "time"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table under a heading."""

    heading: str
    explained: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(study: Study) -> list[Table]:
    """All that have a row."""
    made = (_savings(study), _gaps(study), _losses(study), _routers(study), _costs(study), _ladder(study))
    return [table for table in made if table.rows]


def _savings(study: Study) -> Table:
    rows, over_documents = [], False
    for arm, size_, _ in study.cells():
        for name in study.losses() if arm != study.baseline else ():
            cells = []
            for axis in AXES:
                pairs = study.pairs(arm, size_, axis, name)
                over_documents |= bool(pairs) and savings.over_documents(pairs)
                cells += [*shown(savings.saving(pairs)), f"{len(pairs)}"] if pairs else ["", "", ""]
            if any(cells):
                seeds = next(cells[i] for i in range(2, 9, 3) if cells[i])
                rows.append([arm, size_, name, *(c for i, c in enumerate(cells) if i % 3 < 2), seeds])
    heads = ["arm", "size", "loss of", *(head for short in SHORT.values() for head in (f"s, {short}", f"η, {short}"))]
    documents = (
        "validation documents, the same for all; with one seed it is over documents alone"
        if over_documents
        else "no validation documents, whose losses are not kept"
    )
    text = (
        f"s: what the arm needs to come down to the causal validation loss that {study.baseline} ends with, over what "
        f"{study.baseline} needs; η = 1/s. Between evaluations loss and axis are interpolated in logarithms, and no "
        f"curve is continued past its end: what an arm has not reached is only bounded. In brackets the "
        f"{savings.LEVEL:.0%} interval of a bootstrap over seeds, both runs of a seed drawn together, and over "
        f"{documents}. Where the learning rate falls along a run, a loss in its middle is above that of a run of that "
        "length, so that s is too high rather than too low."
    )
    return Table("Savings", text, [*heads, "seeds"], rows)


def shown(saving: Saving) -> tuple[str, str]:
    """s and η with their intervals."""
    s = saving.share
    turned = Share(s.eta, {"": "", "above": "below", "below": "above"}[s.bound])  # pyrefly: ignore[bad-argument-type]
    return _share(s, saving.interval), _share(turned, _inverse(saving.interval))


def _inverse(interval: Interval | None) -> Interval | None:
    return interval and Interval(1 / interval.high, 1 / interval.low)


def _share(share: Share, interval: Interval | None) -> str:
    sign = {"": "", "above": "> ", "below": "< "}[share.bound]
    between = "" if interval is None else f" [{_end(interval.low)}, {_end(interval.high)}]"
    return ("not reached: " if share.bound == "above" else "") + f"{sign}{share.value:.3f}{between}"


def _end(value: float) -> str:
    return "not reached" if math.isinf(value) or value == 0 else f"{value:.3f}"


def _gaps(study: Study) -> Table:
    rows, over_documents = [], False
    for arm, size_, _ in study.cells():
        others = [study.baseline] if arm != study.baseline else []
        for other in [*others, *([study.compare[arm]] if arm in study.compare else [])]:
            for name in study.losses():
                cells = []
                for axis in AXES:
                    pairs = study.pairs(arm, size_, axis, name, other)
                    over_documents |= bool(pairs) and savings.over_documents(pairs)
                    both = [curve for pair in pairs for curve in (pair.arm, pair.baseline)]
                    there = both and max(curve.x[0] for curve in both) <= min(curve.x[-1] for curve in both)
                    cells.append(_gap(savings.gap(pairs)) if there else "")
                if any(cells):
                    rows.append([f"{arm} − {other}", size_, name, *cells])
    widened = ", widened by that over the choice of validation documents" if over_documents else ""
    text = (
        "Causal validation loss minus that of another arm, in nats a token, at the most tokens, FLOPs or seconds that "
        f"both have used: mean over seeds with Student's {savings.LEVEL:.0%} interval of the paired "
        f"differences{widened}. What lies within it is not shown."
    )
    return Table(
        "Difference in loss", text, ["arms", "size", "loss of", *(f"at equal {a}" for a in SHORT.values())], rows
    )


def _gap(gap: savings.Gap) -> str:
    single = f" (one seed; documents ± {gap.by_document:.4f})" if gap.by_document else ""
    return f"{gap.difference:+.4f}" + (single if math.isinf(gap.half) else f" ± {gap.half:.4f}")


def _losses(study: Study) -> Table:
    names = study.losses()
    rows = []
    for arm, size_, runs in study.cells():
        last = [run.evaluations[-1] for run in runs if run.evaluations]
        found = [losses(each.values) for each in last]
        cells = [_mean(each[name] for each in found if name in each) for name in names]
        both = [each.values[TOPK] - each.values[CAUSAL] for each in last if {TOPK, CAUSAL} <= each.values.keys()]
        right = [each.values.get("eval/auxiliary/accuracy") for each in last]
        never = [each.values.get("eval/auxiliary/always_skip") for each in last]
        agree = [_mean((v for v in values if v is not None), "{:.1%}") for values in (right, never)]
        rows.append([arm, size_, *cells, _mean(both, "{:+.4f}"), *agree, f"{len(runs)}"])
    heads = ["arm", "size", *names, "top-k − causal", "routers agree", "always no", "seeds"]
    text = (
        "Causal validation loss after the last step, in nats a token; mean ± standard deviation over seeds. Top-k "
        "routing, as in training, looks at later tokens; how far it differs from causal routing, and how often the "
        "causal routers decide as top-k does beside always saying no, stands after it."
    )
    return Table("Losses at the end", text, heads, rows)


@dataclasses.dataclass(frozen=True)
class Router:
    """How a routed block used its experts at the end of a run."""

    layer: int
    part: str
    """What of the layer: the group of experts, or "depth"."""
    values: dict[str, float]
    """`load/<modality>`, `entropy`, `specialisation`."""


def routers(run: Run) -> list[Router]:
    """Routed blocks of a run by its last evaluation, under causal routing where it has it."""
    values = run.evaluations[-1].values if run.evaluations else {}
    for routing in ("causal", "topk"):
        found: dict[str, dict[str, float]] = {}
        for key, value in values.items():
            if match := re.fullmatch(rf"eval/{routing}/router/(.+?)/(load/.+|entropy|specialisation)", key):
                found.setdefault(match[1], {})[match[2]] = value
        if found:
            return [Router(*_place(block), values) for block, values in found.items()]
    return []


def _place(block: str) -> tuple[int, str]:
    """`layers.3.feedforward.groups.text` → 3, "text"."""
    layer = re.search(r"layers\.(\d+)", block)
    return int(layer[1]) if layer else 0, block.rpartition("groups.")[2] if "groups." in block else "depth"


def _routers(study: Study) -> Table:
    rows = []
    for arm, size_, runs in study.cells():
        each = [{(r.layer, r.part): r.values for r in routers(run)} for run in runs]
        for place in sorted({place for found in each for place in found}):
            values = [found[place] for found in each if place in found]
            loads = [key for key in values[0] if key.startswith("load/")]
            load = ", ".join(f"{key[5:]} {statistics.mean(v.get(key, 0) for v in values):.3f}" for key in loads)
            others = [_mean((v[k] for v in values if k in v), "{:.3f}") for k in ("entropy", "specialisation")]
            rows.append([arm, size_, f"{place[0]}", place[1], load, *others])
    text = (
        "Routed blocks at the end, under causal routing where there is one. Load: experts a token of a modality meets "
        "on average, under Mixture-of-Depths the share that passes. Entropy of the experts' shares of rows over its "
        "maximum. Specialisation: mean over experts of 1 − H(p), p the modalities' shares in an expert's rows, over "
        "the maximum of H (arXiv 2504.07951 §5); an uneven mixture of modalities alone makes it larger than 0."
    )
    return Table("Routers", text, ["arm", "size", "layer", "part", "load", "entropy", "specialisation"], rows)


def _costs(study: Study) -> Table:
    rows = []
    for arm, size_, runs in study.cells():
        speeds = [run.speed for run in runs if run.speed is not None]
        ends = [run.evaluations[-1].used for run in runs if run.evaluations]
        rows.append(
            [
                arm,
                size_,
                *(count(statistics.mean(end[axis] for end in ends)) if ends else "" for axis in ("tokens", "flops")),
                _mean((end["seconds"] for end in ends), "{:.0f}"),
                _mean((each.tokens_per_second for each in speeds), "{:,.0f}"),
                size(max(each.memory for each in speeds)) if any(each.memory for each in speeds) else "",
            ]
        )
    text = (
        "Of the whole training: tokens, FLOPs (forward and backward, routers too), seconds of steps, median tokens a "
        "second, and what a rank held at most (tensors on an accelerator, the whole process on a CPU)."
    )
    return Table("Cost", text, ["arm", "size", "tokens", "FLOPs", "seconds", "tokens/s", "memory"], rows)


def _ladder(study: Study) -> Table:
    """Power laws over the sizes, where there are three or more."""
    rows = []
    for arm in study.arms:
        for name in study.losses():
            compute, loss = [], []
            for size_ in study.sizes:
                found = [run.curves("flops")[name] for run in study.of(arm, size_) if name in run.curves("flops")]
                if found:
                    compute.append(statistics.mean(float(curve.x[-1]) for curve in found))
                    loss.append(statistics.mean(float(curve.loss[-1]) for curve in found))
            if len(compute) < 3:
                continue
            law = savings.fit(compute, loss)
            curve = savings.fit(compute, loss, floor=True) if len(compute) > 3 else None
            floor = "" if curve is None else f"{curve.floor:.3f} {_half(curve.floor_half)}, {curve.exponent:.3f}"
            rows.append([arm, name, f"{law.exponent:.4f} {_half(law.exponent_half)}", f"{law.scale:.3f}", floor])
    text = (
        "Loss = a · C^−b of the losses at the end of the sizes over their training FLOPs, by least squares in "
        f"logarithms, with the {savings.LEVEL:.0%} interval of b; with four sizes or more also E + a · C^−b. Sizes "
        "that are not each trained for as long as is best for them bend such a line."
    )
    return Table("Over sizes", text, ["arm", "loss of", "b", "a", "E, b with E"], rows)


def _half(half: float) -> str:
    return "" if math.isinf(half) else f"± {half:.4f}"


def _mean(values: Iterable[float], form: str = "{:.4f}") -> str:
    """Mean, with the standard deviation of several; nothing of none."""
    numbers = list(values)
    if not numbers:
        return ""
    spread = f" ± {form.replace('+', '').format(statistics.stdev(numbers))}" if len(numbers) > 1 else ""
    return form.format(statistics.mean(numbers)) + spread
