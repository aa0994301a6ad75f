"""What the routers of an adapted model report, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Sequence

import zoo.adapt as za
from zoo.routing.statistics import Load, RouterHits, RoutingStatistics


def routing_sums(trace: za.Trace | None, layers: Sequence[str]) -> RoutingStatistics:
    """What a forward's routers report, of each of `layers`, so that ranks agree; zero where no token could be skipped.

    Args:
        trace: None for a forward of which nothing counts.
    """
    said = RoutingStatistics() if trace is None else trace.statistics
    hits = {layer: said.hits.get(layer, RouterHits(0, 0, 0, 0)) for layer in layers}
    return RoutingStatistics(hits, {layer: said.loads.get(layer, Load(0, 0)) for layer in layers})


def skipped(routing: RoutingStatistics) -> dict[str, float]:
    """Share of the tokens that could be skipped and were, by layer, where any could."""
    return {layer: 1 - share for layer, share in routing.shares().items()}


def routing_values(routing: RoutingStatistics, each: bool = False) -> dict[str, float]:
    """Reports from `routing_sums` added up: `skip/<layer>`, the share of the tokens that could be skipped and were,
    `skip` of all layers together; `auxiliary/{accuracy,precision,recall,always_skip}`, how well routers foresee who is
    kept.

    Args:
        each: also `auxiliary/<layer>/…`.
    """
    whole = sum(routing.loads.values(), Load(0, 0))
    if not whole.offered:
        return {}
    values = {"skip": 1 - whole.share} | {f"skip/{layer}": share for layer, share in skipped(routing).items()}
    values |= {f"auxiliary/{key}": value for key, value in routing.all_hits().rates().items()}
    for layer, hits in routing.hits.items() if each else ():
        values |= {f"auxiliary/{layer}/{key}": value for key, value in hits.rates().items()}
    return values
