"""What the fused kernels of a GPU take and leave, without what they compute: for the meta device, where a model has
shapes and no values. With them `zoo.storages` counts what a step would hold on a GPU.

Attention is a backend of its own. Of mamba-ssm and causal-conv1d these are the functions that `mamba_ssm` calls, so
that the copies which it makes for them are counted, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.context import TokenContext

SCAN_CHUNK = 2048
"""Steps for which mamba-ssm's scan keeps one pair of states."""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`; of the scores nothing but a number a query and head is kept."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, log_sums = torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # pyrefly: ignore[bad-override]
        return tuple(torch.empty_like(value) for value in ctx.saved_tensors[:3])


class _Kept(torch.autograd.Function):
    """A kernel that keeps its tensors and more of its own, and whose first result is like its first operand."""

    @staticmethod
    def forward(ctx: Any, more: tuple[Tensor, ...], *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands, *more)
        ctx.operands = len(operands)
        return torch.empty_like(operands[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        return None, *(torch.empty_like(value) for value in ctx.saved_tensors[: ctx.operands])


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's: u, delta, z (B, W, T), A (W, N), B and C (B, 1, N, T). It keeps its ungated output as well."""
    rows, width, length = u.shape
    chunks = u.new_empty(rows, width, -(-length // SCAN_CHUNK), 2 * A.shape[1], dtype=torch.float32)
    y = _Kept.apply((torch.empty_like(u), chunks), u, delta, A, B, C, D, z, delta_bias)
    return y, chunks[:, :, -1, 1::2]


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """causal-conv1d's: x (B, W, T)."""
    return _Kept.apply((), x, weight, bias)


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """mamba-ssm's: x (B, T, H, K), dt (B, T, H), B and C (B, T, S, N). It keeps its output, and its backward computes
    again what is inside chunks."""
    rows, length, heads, width = x.shape
    y = _Kept.apply((torch.empty_like(x),), x, dt, A, B, C, D)
    return y, x.new_empty(rows, heads, width, B.shape[-1], dtype=torch.float32)
