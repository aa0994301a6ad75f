"""The definitions: short, plain PyTorch, on any device. Every backend is tested against these."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zoo.context import TokenContext


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """Causal attention inside each document of a packed row.

    Args:
        query: (B, T, H, K).
        key, value: (B, T, Hkv, K); H is a multiple of Hkv (grouped-query attention, head h uses h // (H / Hkv)).
        context: documents of the tokens.
    Returns:
        (B, T, H, K); what stands at padding is unspecified (finite).
    """
    return masked_attention(query, key, value, context.mask)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √K) V under a (B, 1, T, S) bool mask; query (B, T, H, K), key and value (B, S, Hkv, K)."""
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    scores = torch.einsum("bthk,bshk->bhts", query, key) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhts,bshk->bthk", weights, value)


def grouped_swiglu(x: Tensor, counts: tuple[int, ...], w_in: Tensor, w_out: Tensor) -> Tensor:
    """SwiGLU feed-forwards of E experts, each over its own run of rows.

    Args:
        x: (R, D) rows sorted by expert.
        counts: rows of each expert, on the host; they add up to R.
        w_in: (E, D, 2F), gate and up projections side by side.
        w_out: (E, F, D).
    Returns:
        (R, D).
    """
    outputs = []
    for expert, rows in enumerate(x.split(counts)):
        gate, up = (rows @ w_in[expert]).chunk(2, dim=-1)
        outputs.append((torch.nn.functional.silu(gate) * up) @ w_out[expert])
    return torch.cat(outputs)
