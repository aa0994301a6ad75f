"""Blocks of the zoo as a benchmark runs them: on random values, alternating runs of text and image, one context a
batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import zoo
from tools.bench.benchmark import leaf
from tools.bench.measure import Variant
from zoo import TokenContext, Trace

MODALITIES = ("text", "image")
RUN = 128
"""Tokens of a run of one modality."""


def alternating(rows: int, length: int, device: str = "cpu") -> TokenContext:
    """Rows of one document in which runs of text and image alternate: as many tokens of each."""
    run = min(RUN, max(1, length // 2))
    modality = (torch.arange(length) // run % 2).expand(rows, length).contiguous()
    return TokenContext.from_modality(modality, modalities=MODALITIES).to(device)


def build(slot: str, config: Mapping[str, Any], width: int, **options: Any) -> Any:
    """A block of the zoo at width D."""
    return zoo.build(slot, config, d_model=width, modalities=MODALITIES, **options)


def build_layer(config: Mapping[str, Any], width: int) -> Any:
    """One layer, residual included, and its depth router if it has one."""
    model = {"modalities": list(MODALITIES), "d_model": width, "vocab_size": 8, "layers": [dict(config)]}
    return zoo.build("model", model).layers[0]


def variant(block: nn.Module, x: Tensor, context: TokenContext) -> Variant:
    """A block on values x (B, T, D). What all layers of a batch share (orders, masks, tables) is derived at warm-up.

    Where a block trains auxiliary routers, their losses are differentiated too.
    """

    def run() -> tuple[Tensor, ...]:
        trace = Trace()
        y = block(x, context.replace(trace=trace))
        return y, *(total for total, _ in trace.losses.values())

    return Variant(run, [x, *block.parameters()])


def variants(
    configs: Mapping[str, Mapping[str, Any]],
    slot: str,
    shape: Sequence[int],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Variant]:
    """A variant for each config, all on the same values of the shape (B, T, D)."""
    rows, length, width = shape
    x, context = leaf(rows, length, width, device=device, dtype=dtype), alternating(rows, length, device)
    return {name: variant(build(slot, config, width).to(device, dtype), x, context) for name, config in configs.items()}
