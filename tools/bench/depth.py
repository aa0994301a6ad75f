"""Mixture-of-Depths: how much of the speed-up that the count of FLOPs promises is there."""

from __future__ import annotations

from tools.bench.benchmark import HIGHER, Comparison, Goal, Group, Settings, benchmark, goals, leaf
from tools.bench.blocks import alternating, build_layer, variant
from tools.bench.measure import both_modes

GOALS = {0.125: Goal(0.85, 0.95), 0.25: Goal(0.95, 0.95), 0.5: Goal(0.95, 0.95)}


def layer(hidden: int, heads: int = 8) -> dict:
    """Attention and a dense feed-forward."""
    return {"mixer": {"type": "attention", "heads": heads}, "feedforward": {"type": "dense", "d_ff": hidden}}


@benchmark("mod")
def depth(settings: Settings) -> Group:
    """A transformer layer under Mixture-of-Depths, B=4 T=1024 D=512 H=8 F=1344: share of the theoretical speed-up."""
    rows, length, width, hidden = 4, settings.size(1024), settings.size(512), settings.size(1344)
    x, context = leaf(rows, length, width), alternating(rows, length)
    plain = layer(hidden)
    dense = build_layer(plain, width)
    variants, pairs = {"dense": variant(dense, x, context)}, []
    for capacity, goal in GOALS.items():
        for auxiliary in (False, True):
            block = build_layer(plain | {"depth": {"type": "mod", "capacity": capacity, "auxiliary": auxiliary}}, width)
            name = f"MoD {capacity:.1%}" + " with auxiliary router" * auxiliary
            variants[name] = variant(block, x, context)
            predicted = block.cost(length).flops[0] / dense.cost(length).flops[0]
            asked = {} if auxiliary else goals(both=goal)
            pairs.append(
                Comparison(name, "dense", HIGHER, asked, predicted, note="FLOPs of projections and causal scores")
            )
    return Group(both_modes(variants), pairs)
