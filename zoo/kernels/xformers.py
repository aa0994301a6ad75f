"""Attention of the package xformers on CUDA: a batch is one row of tokens, and its documents are blocks on the
diagonal.

The package is imported when a function runs, never before. The documents' bounds come from the host.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from zoo.context import TokenContext
from zoo.kernels import per_document, sdpa
from zoo.kernels.sdpa import masked_attention  # noqa: F401  decoding is a few queries: nothing to pass over

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = 8
"""The head width K must be a multiple: rows are read 16 bytes at a time."""


@functools.cache
def missing() -> str | None:
    """Why this backend does not work here; None where it does."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    try:
        importlib.import_module("xformers.ops")
    except Exception as error:  # a binary built for another torch fails with whatever the loader says
        return f"import xformers.ops: {type(error).__name__}: {error}; pip install -e .[gpu]"
    return None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`.

    Rows of a single document, fp64, and head widths that are not a multiple of 8 go by `sdpa`. Contexts with items go
    by `per_document`: the package's blocks on the diagonal are causal and know nothing of items.
    """
    if (context.single_document and context.item is None) or not takes(query):
        return sdpa.packed_attention(query, key, value, context)
    if context.item is not None:
        return per_document.packed_attention(query, key, value, context)
    from xformers.ops import memory_efficient_attention

    groups = query.shape[2] // key.shape[2]
    if groups > 1:  # an explicit repeat: not every kernel it may choose has a backward for grouped queries
        key, value = key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
    flat = (x.reshape(1, -1, *x.shape[2:]) for x in (query, key, value))
    return memory_efficient_attention(*flat, attn_bias=bias(context)).view(query.shape)


def takes(query: Tensor) -> bool:
    """Whether the package works for queries (B, T, H, K) like this."""
    return query.is_cuda and query.dtype in DTYPES and query.shape[-1] % WIDTHS == 0 and query.numel() > 0


def bias(context: TokenContext) -> object:
    """The package's mask of the B·T tokens in one row, made by the first layer that asks."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    return context.shared(
        "xformers bias",
        lambda: BlockDiagonalCausalMask.from_seqlens(runs(context), device=context.modality.device),
    )


def runs(context: TokenContext) -> list[int]:
    """Lengths of the pieces that the B·T tokens fall into: each document, and the padding between two of them.

    Padding is a piece of its own, so that no token needs to move; what it sees does not matter.
    """
    rows, columns = context.shape
    lengths, end = [], 0
    for row, start, length in context.document_spans:
        begin = row * columns + start
        if begin > end:
            lengths.append(begin - end)
        lengths.append(length)
        end = begin + length
    return [*lengths, rows * columns - end] if end < rows * columns else lengths
