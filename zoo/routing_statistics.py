"""What routers tell the trace, and what is read from it: loads of blocks and experts, hits of auxiliary routers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from zoo.context import TokenContext

EXPERT = "expert "
"""Begins the name of an expert's rows in the load statistics."""


def record_load(context: TokenContext, name: str, taken: int, offered: int, experts: Sequence[int] = ()) -> None:
    """Tell the trace how many of the token–expert pairs offered were taken, and by each of `experts` where the router
    leaves that open; all are known on the host."""
    if context.trace is not None:
        sums = {"taken": taken, "offered": offered} | {f"{EXPERT}{e}": rows for e, rows in enumerate(experts)}
        context.trace.add_statistics(f"{name}/load", {key: torch.tensor(float(value)) for key, value in sums.items()})


def loads(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Share of its tokens that each routed block took, by name, from summed statistics; for `Model.cost`."""
    return {
        name.removesuffix("/load"): sums["taken"] / sums["offered"]
        for name, sums in statistics.items()
        if name.endswith("/load") and sums["offered"]
    }


def balance(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """How evenly token-choosing groups are used, from summed statistics, for the metrics.

    Returns:
        `<block>/<expert>`, the expert's share of the group's rows (no-op experts stand after the others), and
        `<block>/imbalance`, the fullest expert's rows over the mean.
    """
    result = {}
    for name, sums in statistics.items():
        rows = {key.removeprefix(EXPERT): value for key, value in sums.items() if key.startswith(EXPERT)}
        if total := sum(rows.values()):
            block = name.removesuffix("/load")
            result |= {f"{block}/{expert}": value / total for expert, value in rows.items()}
            result[f"{block}/imbalance"] = max(rows.values()) * len(rows) / total
    return result


def rates(sums: dict[str, float]) -> dict[str, float]:
    """Accuracy, precision, recall of an auxiliary router and the accuracy of always saying no, from summed hits."""
    total, chosen, said, both = (float(sums[key]) for key in ("total", "chosen", "said", "both"))
    if total == 0:
        return {}
    wrong = (said - both) + (chosen - both)
    return {
        "accuracy": 1 - wrong / total,
        "precision": both / said if said else 1.0,
        "recall": both / chosen if chosen else 1.0,
        "always_skip": 1 - chosen / total,
    }
