"""Cross-entropy and log Z of a linear layer's logits. Where these are large they never exist whole.

The logits of n tokens over a vocabulary of V are the largest tensor of a training step: at 16,384 tokens and 65,536
ids 4 GiB in fp32, of which autograd needs five at once. Beyond `CHUNK_BYTES` they are made for a part of the vocabulary
at a time, once in the forward pass and once more in the backward pass: a third more of this layer's work, and memory
for fewer than two chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 1 << 28
"""Bytes of the largest part of the logits that exists at once, in fp32. Logits that fit are kept for the backward
pass."""
ALIGNED = 128
"""A chunk's number of ids is a multiple of it, as matrix products are fast with."""


class TokenLosses(NamedTuple):
    """What n tokens lose; at least fp32."""

    cross_entropy: Tensor
    """(…) in nats; 0 where there is no target."""
    log_z: Tensor | None
    """(…) log Σ exp of all logits; None where nobody asked."""


def of_logits(logits: Tensor, target: Tensor, log_z: bool = True) -> TokenLosses:
    """What logits (…, V) lose against `target` (…), an id or a negative number where there is none."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = wide.reshape(-1, wide.shape[-1])
    losses = F.cross_entropy(flat, target.reshape(-1).clamp_min(-1), ignore_index=-1, reduction="none")
    return TokenLosses(losses.view(target.shape), wide.logsumexp(-1) if log_z else None)


def linear_losses(
    x: Tensor, weight: Tensor, target: Tensor, log_z: bool = True, chunk_bytes: int = CHUNK_BYTES
) -> TokenLosses:
    """`of_logits(x @ weightᵀ, target)`, to rounding, without all logits at once where they exceed `chunk_bytes`.

    Args:
        x: (…, D).
        weight: (V, D).
        target: (…) int64, an id or a negative number where there is none.
        log_z: whether log Z is wanted.
        chunk_bytes: most bytes of logits, counted in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    chunks = -(-target.numel() * weight.shape[0] * wide.itemsize // chunk_bytes)
    if chunks <= 1:
        return of_logits(F.linear(x, weight), target, log_z)
    width = -(-weight.shape[0] // (chunks * ALIGNED)) * ALIGNED
    losses, log_partition = _Chunked.apply(x.reshape(-1, x.shape[-1]), weight, target.reshape(-1), width)
    return TokenLosses(losses.view(target.shape), log_partition.view(target.shape))


class _Chunked(torch.autograd.Function):
    """Cross-entropy and log Z of n tokens, `width` ids at a time. Chunks of the vocabulary rather than of the tokens:
    each row of the weight's gradient is then one product, and no gradient as large as the weight is added up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """x (n, D), weight (V, D), target (n,) → (n,), (n,)."""
        log_z = x.new_full(target.shape, -torch.inf, dtype=torch.promote_types(x.dtype, torch.float32))
        at_target = torch.zeros_like(log_z)
        for part in _parts(len(weight), width):
            there, log_sum = _read(_logits(x, weight[part]), target, part)
            at_target += there
            log_z = torch.logaddexp(log_z, log_sum)
        ctx.width = width
        ctx.save_for_backward(x, weight, target, log_z)
        return (log_z - at_target).masked_fill(target < 0, 0.0), log_z

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, d_losses: Tensor, d_log_z: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, target, log_z = ctx.saved_tensors
        d_losses = d_losses.masked_fill(target < 0, 0.0)
        everywhere = (d_losses + d_log_z)[:, None]
        dx = torch.zeros_like(x, dtype=log_z.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for part in _parts(len(weight), ctx.width):
            inside, column = _columns(target, part)
            gradient = _logits(x, weight[part]).sub_(log_z[:, None]).exp_().mul_(everywhere)
            gradient.scatter_add_(1, column, -d_losses.masked_fill(~inside, 0.0)[:, None])
            gradient = gradient.to(x.dtype)
            if d_weight is not None:
                torch.mm(gradient.T, x, out=d_weight[part])
            if dx is not None:
                _add_product(dx, gradient, weight[part])
            del gradient  # before the next one is made
        return None if dx is None else dx.to(x.dtype), d_weight, None, None


def _parts(ids: int, width: int) -> list[slice]:
    """The vocabulary cut into chunks of at most `width` ids."""
    return [slice(start, min(start + width, ids)) for start in range(0, ids, width)]


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits of a chunk, a new tensor (n, ≤ width), rounded as the model's are and then widened to fp32."""
    logits = F.linear(x, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _read(logits: Tensor, target: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """(n,) the logits of the targets that are in a chunk, 0 for the others; and (n,) log Σ exp of the chunk. The
    chunk's logits are overwritten."""
    inside, column = _columns(target, part)
    there, top = logits.gather(1, column)[:, 0].masked_fill_(~inside, 0.0), logits.amax(1)
    return there, logits.sub_(top[:, None]).exp_().sum(1).log_().add_(top)


def _columns(target: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """(n,) bool, which targets are in the chunk; and (n, 1) their columns there, any column for the others."""
    column = target - part.start
    inside = (column >= 0) & (column < part.stop - part.start)
    return inside, column.masked_fill(~inside, 0)[:, None]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the precision of `total` where the device can."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b
