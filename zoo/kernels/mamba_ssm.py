"""Scan, state-space dual and causal convolution of the packages mamba-ssm and causal-conv1d, on CUDA.

The packages are imported when a function runs, never before: their own imports need a GPU's libraries. Rows are brought
into time order, which their kernels need; documents stay apart by what each kernel offers.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import chunked, outlines
from zoo.kernels.layout import Layout, causal_window

FORGET = 1e30
"""Δ at a separator between documents: exp(Δ A) is 0 for any |A| above 1e-28, and its input is 0, so the state becomes
0. A large Δ at a document's first token instead would also scale that token's input."""
MOST_STATES = 256
"""Largest N of the scan's kernel."""
NEVER = -1e4
"""dt where there is no token: softplus gives Δ = 0, the state stays."""


@functools.cache
def missing() -> str | None:
    """Why this backend does not work here; None where it does."""
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    for name in ("causal_conv1d", "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.ssd_combined"):
        try:
            importlib.import_module(name)
        except Exception as error:  # a binary built for another torch fails with whatever the loader says
            return f"import {name}: {type(error).__name__}: {error}; pip install -e .[gpu] --no-build-isolation"
    return None


def _function(module: str, name: str, like: Tensor) -> Callable[..., Any]:
    """A function of the packages; for values without contents its outline."""
    return getattr(outlines if like.is_meta else importlib.import_module(module), name)


@functools.cache
def _say_too_many_states(states: int) -> None:
    warnings.warn(
        f"d_state: {states} is more than the {MOST_STATES} that mamba-ssm's scan takes; the scan runs in plain PyTorch",
        stacklevel=3,
    )


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, window: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `reference.causal_conv1d`; filters of 2 to 4 taps and a multiple of 8 channels, the others by `chunked`."""
    channels, taps = weight.shape
    if not 2 <= taps <= 4 or channels % 8:
        return chunked.causal_conv1d(x, weight, bias, layout, window)
    causal_conv1d_fn = _function("causal_conv1d", "causal_conv1d_fn", x)
    if window is not None:  # in front of the input: the kernel does not take an initial state together with documents
        rows, layout, window = causal_window(x, layout, window)
        return causal_conv1d(rows, weight, bias, layout)[0][: x.shape[0]], window
    values = layout.to_time(x).contiguous().transpose(1, 2)  # (B, W, T), channels next to each other
    y = causal_conv1d_fn(
        values, weight.contiguous(), bias, seq_idx=layout.document if layout.many_documents else None, activation="silu"
    )
    return layout.to_rows(y.transpose(1, 2)), None


def selective_scan(
    u: Tensor,
    dt: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.selective_scan`, but the final state has no gradient; more than 256 states go by `chunked`.

    The kernel takes no initial state: decoding goes by `chunked`. It has one bias vector, added in fp32. Of the biases
    of several groups that is their mean; what a group's is off it is added to its rows before, in their dtype.
    """
    if A.shape[1] > MOST_STATES:
        _say_too_many_states(A.shape[1])
    if state is not None or A.shape[1] > MOST_STATES:
        return chunked.selective_scan(u, dt, bias, A, B, C, D, z, layout, state)
    selective_scan_fn = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn", u)
    dtype, delta_bias = u.dtype, bias.float()[0]
    if bias.shape[0] > 1:
        delta_bias = bias.float().mean(0)
        dt = layout.biased(dt, (bias.float() - delta_bias).to(dt.dtype))
    u_t, dt_t, z_t, B_t, C_t = (layout.to_time(value) for value in (u, dt, z, B, C))
    if layout.padded:
        dt_t = dt_t.masked_fill((layout.row < 0).unsqueeze(-1), NEVER)
    place = None
    if layout.many_documents:
        place, columns = layout.apart
        u_t, z_t, B_t, C_t = (_spread(value, place, columns, 0.0) for value in (u_t, z_t, B_t, C_t))
        ends = torch.arange(columns, device=u.device) > place[:, -1:]
        dt_t = _spread(dt_t, place, columns, FORGET).masked_fill(ends.unsqueeze(-1), NEVER)
    # one set of B and C for all channels: (B, 1, N, T)
    u_t, dt_t, z_t, B_t, C_t = (value.transpose(1, 2).contiguous() for value in (u_t, dt_t, z_t, B_t, C_t))
    B_t, C_t, options = B_t.unsqueeze(1), C_t.unsqueeze(1), {"delta_softplus": True, "return_last_state": True}
    y, h = selective_scan_fn(u_t, dt_t, A.float().contiguous(), B_t, C_t, D.float(), z_t, delta_bias, **options)
    y = y.transpose(1, 2)
    if place is not None:
        y = y.gather(1, place.unsqueeze(-1).expand(-1, -1, y.shape[-1]))
    return layout.to_rows(y).to(dtype), h.detach()


def _spread(values: Tensor, place: Tensor, columns: int, fill: float) -> Tensor:
    """values (B, T, W) at the columns `place` (B, T) of (B, columns, W), `fill` elsewhere."""
    wide = values.new_full((values.shape[0], columns, values.shape[2]), fill)
    return wide.scatter(1, place.unsqueeze(-1).expand_as(values), values)


def ssd(
    x: Tensor,
    dt: Tensor,
    bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    layout: Layout,
    state: Tensor | None = None,
    chunk: int = 256,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`. Δ is made here, in fp32: rows may have biases of several groups."""
    mamba_chunk_scan_combined = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", x)
    delta = F.softplus(layout.biased(dt.float(), bias.float()))
    # steps after a sequence's last token have Δ = 0: they leave the state as it is
    x_t, delta_t, B_t, C_t = (layout.to_time(value).contiguous() for value in (x, delta, B, C))
    y, h = mamba_chunk_scan_combined(
        x_t,
        delta_t,
        A.float(),
        B_t,
        C_t,
        chunk,
        D=D.float(),
        initial_states=state,
        seq_idx=layout.document if layout.many_documents or state is not None else None,
        return_final_states=True,
    )
    return layout.to_rows(y).to(x.dtype), h
