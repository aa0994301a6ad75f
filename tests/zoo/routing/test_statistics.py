"""What routers report: rates and shares by hand, and sums over micro-batches and ranks."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.context import TokenContext
from zoo.routing.selection import ExpertSelection
from zoo.routing.statistics import ExpertLoad, Load, RouterHits, RoutingStatistics, Usage
from zoo.trace import Trace


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


@pytest.mark.parametrize(
    ("rows", "offered", "expected"),
    [
        ((6, 0, 0, 2), (6, 2), {"load/a": 1, "load/b": 1, "entropy": 0.8112781, "specialisation": 1}),
        ((3, 1, 3, 1), (6, 2), {"load/a": 1, "load/b": 1, "entropy": 1, "specialisation": 1 - 0.8112781}),
        ((4, 0, 4, 0), (8, 0), {"load/a": 1, "entropy": 1}),
        ((3, 1), (6, 4), {"load/a": 0.5, "load/b": 0.25, "specialisation": 1 - 0.8112781}),
        ((0, 0, 0, 0), (6, 2), {"load/a": 0, "load/b": 0}),
        ((0, 0), (0, 0), {}),
    ],
)
def test_how_experts_are_used(rows: tuple[int, ...], offered: tuple[int, ...], expected: dict[str, float]) -> None:
    """Two modalities; 0.811 bits are the entropy of three quarters and one."""
    usage = Usage(rows, offered)
    assert usage.summary(("a", "b")) == pytest.approx(expected)
    both = usage + usage
    assert both.summary(("a", "b")) == pytest.approx(expected) and both.of(usage.numbers()) == usage


@pytest.mark.parametrize("causal", [False, True])
def test_usage_counts_what_the_blocks_do(causal: bool) -> None:
    """Experts inside Mixture-of-Depths, beside the decisions that the trace kept; only a detailed trace counts."""
    layer = {
        "mixer": {"type": "attention", "heads": 2},
        "feedforward": {"type": "experts", "experts": 3, "d_ff": 8},
        "depth": {"type": "mod", "capacity": 0.5},
    }
    config = {"modalities": ["text", "image"], "d_model": 16, "vocab_size": 9, "layers": [layer]}
    model = zoo.build("model", config, seed=0).eval()
    modality = torch.tensor([[0, 0, 1, 1, 1, 0, 1, -1], [1, 1, 0, 0, 0, 0, -1, -1]])
    trace = Trace(detailed=True)
    context = TokenContext.from_modality(modality, trace=trace, routing="causal" if causal else "topk")
    model(torch.zeros(2, 8, dtype=torch.int64), context)
    usage = trace.statistics.usage
    depth = next(use for name, use in usage.items() if len(use.rows) == 2)
    assert depth.offered == (7, 6)
    experts = next(use for name, use in usage.items() if len(use.rows) == 6)
    assert experts.offered == depth.rows, "experts are offered what the layer lets pass"
    decision = next(d for d in trace.decisions.values() if isinstance(d, ExpertSelection))
    assert [experts.rows[2 * e] + experts.rows[2 * e + 1] for e in range(3)] == list(decision.counts)
    plain = Trace()
    model(torch.zeros(2, 8, dtype=torch.int64), context.replace(trace=plain))
    assert not plain.statistics.usage and plain.decisions.keys() == trace.decisions.keys()
