"""Attention through PyTorch's scaled_dot_product_attention: everywhere, under a mask where documents are packed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`. Rows of a single document without items need no mask and take the
    causal fast path."""
    mask = None if context.single_document and context.item is None else context.mask
    return _attention(query, key, value, mask)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As `reference.masked_attention`. Heads that share keys stand as further queries, so that no key is copied."""
    heads = key.shape[2]
    groups = query.shape[2] // heads
    if groups > 1:
        queries = query.shape[1]
        stacked = query.unflatten(2, (heads, groups)).permute(0, 3, 1, 2, 4).flatten(1, 2)  # (B, G·T, Hkv, K)
        out = _attention(stacked, key, value, mask.repeat(1, 1, groups, 1))
        return out.unflatten(1, (groups, queries)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    return _attention(query, key, value, mask)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    groups = query.shape[2] // key.shape[2]
    if groups > 1:  # an explicit repeat: the fused CPU path does not take enable_gqa together with a mask
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
    return out.transpose(1, 2)
