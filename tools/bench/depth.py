"""Mixture-of-Depths: how much of the speed-up that the count of FLOPs promises is there."""

from __future__ import annotations

import torch

from tools.bench.benchmark import HIGHER, Comparison, Goal, Group, Settings, benchmark, goals, leaf
from tools.bench.blocks import MODALITIES, alternating, build_layer, variant
from tools.bench.measure import both_modes
from zoo import TokenContext

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


DOCUMENT, LENGTHS = 512, (2048, 8192, 32768)


@benchmark("mod.packed")
def packed(settings: Settings) -> Group:
    """A layer under Mixture-of-Depths at 50 % over packed documents of 512 tokens, B=1 D=256 F=704: its time at T
    tokens over that at 2,048, divided by as many times the tokens. 1 is linear."""
    width, hidden, document = settings.size(256), settings.size(704), settings.size(DOCUMENT)
    mixers = {"attention": {"heads": 8}, "mamba": {}, "mamba2": {"head_dim": settings.size(64)}}
    variants, pairs = {}, []
    for mixer, options in mixers.items():
        config = {"mixer": {"type": mixer, **options}, "feedforward": {"type": "dense", "d_ff": hidden}}
        block = build_layer(config | {"depth": {"type": "mod", "capacity": 0.5}}, width)
        names = [f"{mixer}, T={length:,}" for length in LENGTHS]
        for name, length in zip(names, map(settings.size, LENGTHS), strict=True):
            modality = (torch.arange(length) // (document // 4) % 2).view(1, -1)
            documents = (torch.arange(length) // document).view(1, -1)
            context = TokenContext.from_modality(modality, documents, modalities=MODALITIES)
            variants[name] = variant(block, leaf(1, length, width), context)
        pairs += [
            Comparison(name, names[0], expected=length / LENGTHS[0], note="of the tokens")
            for name, length in zip(names[1:], LENGTHS[1:], strict=True)
        ]
    return Group(both_modes(variants), pairs)
