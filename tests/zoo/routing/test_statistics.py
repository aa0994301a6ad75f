"""What routers report: rates and shares by hand, and sums over micro-batches and ranks."""

from __future__ import annotations

import torch

from zoo.routing.statistics import ExpertLoad, Load, RouterHits, RoutingStatistics


def test_rates_by_hand() -> None:
    # of 20 decisions 5 were chosen; the router said yes to 4, of which 3 rightly: 1 false alarm, 2 missed
    assert RouterHits(20, 5, 4, 3).rates() == {
        "accuracy": 1 - 3 / 20,
        "precision": 3 / 4,
        "recall": 3 / 5,
        "always_skip": 15 / 20,
    }
    assert RouterHits(4, 0, 0, 0).rates()["accuracy"] == 1
    assert RouterHits(0, 0, 0, 0).rates() == {}


def test_shares_and_imbalance_by_hand() -> None:
    assert ExpertLoad((6.0, 2.0)).balance() == {"0": 0.75, "1": 0.25, "imbalance": 1.5}
    assert ExpertLoad((0, 0)).balance() == {}
    statistics = RoutingStatistics(loads={"a": Load(1, 2), "b": Load(0, 0)})
    assert statistics.shares() == {"a": 0.5}


def test_sums_over_micro_batches_and_ranks() -> None:
    """Counts known to the device alone and counts on the host; names in any order; a block that one forward lacks."""
    first = RoutingStatistics(
        {"b": RouterHits(4, torch.tensor(2), torch.tensor(1), torch.tensor(1)), "a": RouterHits(1, 0, 0, 0)},
        {"b": Load(2, 4)},
        {"c": ExpertLoad((1, 2, 3))},
    )
    second = RoutingStatistics(
        {"b": RouterHits(4, torch.tensor(3), torch.tensor(2), torch.tensor(0))}, {"d": Load(1, 1)}
    )
    step = first + second
    assert step.hits["b"] == RouterHits(8, 5, 3, 1) and step.hits["a"] == RouterHits(1, 0, 0, 0)
    assert step.all_hits() == RouterHits(9, 5, 3, 1)
    assert step.loads == {"b": Load(2, 4), "d": Load(1, 1)} and step.expert_loads == first.expert_loads
    flat = step.flat()
    assert flat.dtype == torch.float64 and flat.tolist() == [1, 0, 0, 0, 8, 5, 3, 1, 2, 4, 1, 1, 1, 2, 3]
    both_ranks = step.with_counts(flat + flat)
    assert both_ranks == step + step
    assert all(isinstance(count, float) for count in both_ranks.hits["b"].numbers())
    other_order = RoutingStatistics(dict(sorted(step.hits.items())), step.loads, step.expert_loads)
    assert torch.equal(other_order.flat(), flat)
    assert RoutingStatistics().flat().shape == (0,)
