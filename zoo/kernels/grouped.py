"""Grouped expert feed-forward: one batched product where all experts have the same number of rows, or one grouped
product on a GPU where only the device knows how many each has."""

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
    if all(count == counts[0] for count in counts):
        gate, up = torch.bmm(x.view(experts, counts[0], x.shape[-1]), w_in).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, w_out).reshape(x.shape)
    outputs = []
    for rows, into, out in zip(x.split(counts), w_in.unbind(0), w_out.unbind(0), strict=True):
        gate, up = (rows @ into).chunk(2, dim=-1)
        outputs.append((F.silu(gate) * up) @ out)
    return torch.cat(outputs)


ALIGNMENT = 16
"""Bytes that a row of a grouped product's operands must be a multiple of."""


def takes_ends(x: Tensor, w_in: Tensor, w_out: Tensor) -> bool:
    """Whether `swiglu_by_ends` works for these, and is the better choice: a GPU multiplies bf16 in one kernel. On a CPU
    the host knows the counts anyway, and a product for each expert takes less time."""
    widths = (x.shape[-1], w_in.shape[-1] // 2, w_out.shape[-1])
    aligned = all(width * x.element_size() % ALIGNMENT == 0 for width in widths)
    return x.device.type != "cpu" and x.dtype == w_in.dtype == torch.bfloat16 and aligned


def swiglu_by_ends(x: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """As `reference.grouped_swiglu`, but with the place (E,) int32, on the device, where the rows of each expert
    end."""
    gate, up = F.grouped_mm(x, w_in, offs=ends).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, w_out, offs=ends)
