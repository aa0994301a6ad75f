"""Attention through PyTorch's flex_attention on CUDA: one compiled kernel that passes over blocks of other documents.

It is imported and compiled when a function runs, never before. Unlike `xformers` it needs the documents on the device
only, so that it also serves a sub-sequence a router selected, and its backward is deterministic.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.context import TokenContext
from zoo.kernels import sdpa
from zoo.kernels.sdpa import masked_attention  # noqa: F401  decoding is a few queries: nothing to pass over

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILERS = ("cc", "gcc", "clang")
"""Where triton looks for a C compiler, after the variable CC."""
NARROWEST = 16
"""Least head width K of the compiled kernel."""


@functools.cache
def missing() -> str | None:
    """Why this backend does not work here; None where it does."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"  # on a CPU PyTorch has no backward for it
    if importlib.util.find_spec("triton") is None:
        return "it needs triton, into which it is compiled; pip install triton"
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        return (
            f"triton needs a C compiler for what starts its kernels; install one of {', '.join(COMPILERS)}, or set CC"
        )
    return None


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """As `reference.packed_attention`. Rows of a single document, heads narrower than 16 and fp64 go by `sdpa`."""
    if (context.single_document and context.item is None) or not takes(query):
        return sdpa.packed_attention(query, key, value, context)
    out = compiled()(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        block_mask=block_mask(context),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def takes(query: Tensor) -> bool:
    """Whether the compiled kernel works for queries (B, T, H, K) like this."""
    return query.is_cuda and query.dtype in DTYPES and query.shape[-1] >= NARROWEST and query.numel() > 0


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """flex_attention, compiled once for rows of any number and length; uncompiled it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def block_mask(context: TokenContext) -> object:
    """The context's blocks of pairs, made by the first layer that asks.

    Making it needs (B, 1, T, T) bools for a moment; none are kept.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows, columns = context.shape
    return context.shared(
        "flex block mask",
        lambda: create_block_mask(sees(context), rows, None, columns, columns, device=context.modality.device),
    )


def sees(context: TokenContext) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`context.mask` as a function of (row, head, query, key), each an integer tensor."""
    document, item = context.document, context.item

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (document[row, query] == document[row, key]) & (query >= key)

    if item is None:
        return causal

    def with_items(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (item[row, query] == item[row, key]) & (item[row, query] >= 0)
        return causal(row, head, query, key) | inside

    return with_items
