"""Grouped expert feed-forward: one batched product where all experts have the same number of rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_swiglu(x: Tensor, counts: tuple[int, ...], w_in: Tensor, w_out: Tensor) -> Tensor:
    """As `reference.grouped_swiglu`.

    Expert choice gives every expert of a group the same count. Elsewhere the stacked weights are taken apart once by
    `unbind`: indexing them expert by expert would make each gradient a zero tensor the size of all experts.
    """
    experts = len(counts)
    if len(set(counts)) == 1:
        gate, up = torch.bmm(x.view(experts, counts[0], x.shape[-1]), w_in).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, w_out).reshape(x.shape)
    outputs = []
    for rows, into, out in zip(x.split(counts), w_in.unbind(0), w_out.unbind(0), strict=True):
        gate, up = (rows @ into).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ out)
    return torch.cat(outputs)
