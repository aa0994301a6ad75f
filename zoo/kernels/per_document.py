"""Attention document by document: no work is spent on pairs of tokens that may not see each other."""

from __future__ import annotations

import bisect
import collections
import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext, same_item
from zoo.gather import pick
from zoo.host import send
from zoo.kernels import sdpa
from zoo.kernels.sdpa import masked_attention  # noqa: F401  decoding is one row a document already

SHORT = 256
"""Tokens a row up to which a sub-sequence costs less under one mask than a table of its documents and a call a
length."""


@dataclasses.dataclass(frozen=True, eq=False)
class SameLength:
    """Documents of the same length L, for one call."""

    index: Tensor
    """(documents, L), flat indices into B·T."""
    mask: Tensor | None
    """(documents, 1, L, L) bool, what each token may see; None: all that came before it, and itself."""


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`: one causal call for all documents of the same length, and another, under a mask,
    for those of them that have items. Short sub-sequences that a router kept take one call under the mask."""
    short = context.narrowed and context.shape[1] <= SHORT
    if short or (context.single_document and context.item is None):
        return sdpa.packed_attention(query, key, value, context)
    rows, columns = query.shape[:2]
    groups = query.shape[2] // key.shape[2]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    flat = [x.reshape(rows * columns, -1) for x in (query, key, value)]
    heads, width = query.shape[2:]
    pieces, places = [], []
    for documents in calls(context):
        length = documents.index.shape[1]
        batch = [pick(x, documents.index.reshape(-1)).view(-1, length, heads, width).transpose(1, 2) for x in flat]
        mask = documents.mask
        out = F.scaled_dot_product_attention(*batch, attn_mask=mask, is_causal=mask is None)
        pieces.append(out.transpose(1, 2).reshape(-1, heads * width))
        places.append(documents.index.reshape(-1))
    result = flat[0].new_zeros(flat[0].shape)
    if pieces:
        result = result.index_copy(0, torch.cat(places), torch.cat(pieces))
    return result.view(rows, columns, heads, width)


def calls(context: TokenContext) -> list[SameLength]:
    """The documents by length, those that need a mask apart; shared by all layers."""
    return context.shared("documents by length", lambda: _by_length(context))


def _by_length(context: TokenContext) -> list[SameLength]:
    spans, device = context.document_spans, context.modality.device
    masked = {
        bisect.bisect_right(spans, (row, start, context.shape[1])) - 1 for row, start, n in context.item_spans if n > 1
    }
    starts = collections.defaultdict(list)
    for number, (row, start, length) in enumerate(spans):
        starts[length, number in masked].append(row * context.shape[1] + start)
    result = []
    for (length, has_items), first in sorted(starts.items()):
        time = torch.arange(length, device=device)
        index = send(first, device)[:, None] + time
        mask = None
        if has_items and context.item is not None:
            mask = same_item(F.embedding(index, context.item.reshape(-1, 1))[..., 0]) | (time[:, None] >= time)
        result.append(SameLength(index, mask))
    return result
