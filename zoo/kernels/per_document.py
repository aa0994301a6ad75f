"""Attention document by document: no work is spent on pairs of tokens that may not see each other."""

from __future__ import annotations

import collections

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext
from zoo.gather import pick
from zoo.kernels import sdpa
from zoo.kernels.sdpa import masked_attention  # noqa: F401  decoding is one row a document already


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`: one causal call for all documents of the same length.

    Where the host does not know the documents' bounds (a sub-sequence selected by a router) the mask is used.
    """
    if context.single_document or context.segments is None or context.item is not None:
        return sdpa.packed_attention(query, key, value, context)
    rows, columns = query.shape[:2]
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    flat = [x.reshape(rows * columns, -1) for x in (query, key, value)]
    heads, width = query.shape[2:]
    pieces, places = [], []
    for length, index in _by_length(context):
        batch = [pick(x, index.reshape(-1)).view(-1, length, heads, width).transpose(1, 2) for x in flat]
        out = F.scaled_dot_product_attention(*batch, is_causal=True)
        pieces.append(out.transpose(1, 2).reshape(-1, heads * width))
        places.append(index.reshape(-1))
    result = flat[0].new_zeros(flat[0].shape)
    if pieces:
        result = result.index_copy(0, torch.cat(places), torch.cat(pieces))
    return result.view(rows, columns, heads, width)


def _by_length(context: TokenContext) -> list[tuple[int, Tensor]]:
    """(length, flat token indices (documents, length)) for each distinct document length; shared by all layers."""

    def compute() -> list[tuple[int, Tensor]]:
        starts = collections.defaultdict(list)
        for row, start, length in context.segments or ():
            starts[length].append(row * context.shape[1] + start)
        device = context.modality.device
        return [
            (length, torch.tensor(first, device=device)[:, None] + torch.arange(length, device=device))
            for length, first in sorted(starts.items())
        ]

    return context.shared("documents by length", compute)
