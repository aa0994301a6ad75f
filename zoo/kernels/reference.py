"""The definitions: short, plain PyTorch, on any device. Every backend is tested against these."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext
from zoo.kernels.layout import Layout, causal_window


def packed_attention(query: Tensor, key: Tensor, value: Tensor, context: TokenContext) -> Tensor:
    """Attention inside each document of a packed row: causal, and in both directions inside an item.

    Query t sees key s of its document if s ≤ t or both belong to the same item (`TokenContext.mask`).

    Args:
        query: (B, T, H, K).
        key, value: (B, T, Hkv, K); H is a multiple of Hkv (grouped-query attention, head h uses h // (H / Hkv)).
        context: documents and items of the tokens.
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
        outputs.append((F.silu(gate) * up) @ w_out[expert])
    return torch.cat(outputs)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, window: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """SiLU(Σ_j weight[k − 1 − j] x_{t−j} + bias), channel by channel; j never reaches before the token's document.

    Args:
        x: (R, W) rows of `layout`.
        weight: (W, k).
        bias: (W,).
        window: (B, k − 1, W), the inputs that came before, 0 before their document's beginning; None: nothing did.
    Returns:
        (R, W), 0 at rows that hold no token; and the window after these tokens, None where none came in.
    """
    if window is not None:
        rows, layout, window = causal_window(x, layout, window)
        return causal_conv1d(rows, weight, bias, layout)[0][: x.shape[0]], window
    values, taps = layout.to_time(x), weight.unbind(1)
    outputs = []
    for t in range(values.shape[1]):
        total = bias.expand_as(values[:, t])
        for j in range(min(t + 1, len(taps))):
            same = (layout.document[:, t - j] == layout.document[:, t]).unsqueeze(-1)
            total = total + torch.where(same, values[:, t - j], 0.0) * taps[-1 - j]
        outputs.append(F.silu(total))
    return layout.to_rows(torch.stack(outputs, dim=1)), None


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
    """Mamba's selective scan (arXiv 2312.00752 §3), a state of N numbers for each of W channels:

        Δ_t = softplus(dt_t + bias of the row's group)
        h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,    h = 0 before a document
        y_t = (C_t · h_t + D u_t) SiLU(z_t)

    Args:
        u, dt, z: (R, W) rows of `layout`.
        bias: (G, W), one a group.
        A: (W, N), negative.
        B, C: (R, N).
        D: (W,).
        state: (B, W, N), h before the first tokens; None: zeros.
    Returns:
        y (R, W), 0 at rows that hold no token, with the dtype of u; h after the last tokens, fp32 or wider.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    delta = F.softplus(layout.biased(dt.to(dtype), bias.to(dtype)))
    real = (layout.row >= 0)[..., None, None]
    steps = [layout.to_time(v.to(dtype)).unbind(1) for v in (u, delta, B, C)]
    h = u.new_zeros(layout.row.shape[0], *A.shape, dtype=dtype) if state is None else state.to(dtype)
    outputs = []
    for t, (u_t, delta_t, B_t, C_t) in enumerate(zip(*steps, strict=True)):  # (B, W) twice, (B, N) twice
        before = h.masked_fill(layout.first[:, t, None, None], 0.0)
        after = torch.exp(delta_t[..., None] * A) * before + (delta_t * u_t)[..., None] * B_t[:, None]
        h = torch.where(real[:, t], after, h)
        outputs.append((h * C_t[:, None]).sum(-1) + D * u_t)
    y = layout.to_rows(torch.stack(outputs, dim=1))
    return (y * F.silu(z.to(dtype))).to(u.dtype), h


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
) -> tuple[Tensor, Tensor]:
    """Mamba-2's state-space dual (arXiv 2405.21060 §6), a K × N state for each of H heads with one decay a head:

        Δ_t = softplus(dt_t + bias of the row's group)
        h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ,    h = 0 before a document
        y_t = h_t C_t + D x_t

    Args:
        x: (R, H, K) rows of `layout`.
        dt: (R, H).
        bias: (G, H), one a group of rows.
        A, D: (H,), A negative.
        B, C: (R, S, N), S sets that H / S heads each share; H is a multiple of S.
        state: (B, H, K, N), h before the first tokens; None: zeros.
    Returns:
        y (R, H, K), 0 at rows that hold no token, with the dtype of x; h after the last tokens, fp32 or wider.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    delta = F.softplus(layout.biased(dt.to(dtype), bias.to(dtype)))
    repeat = x.shape[1] // B.shape[1]
    B, C = (v.to(dtype).repeat_interleave(repeat, dim=1) for v in (B, C))
    real = (layout.row >= 0)[..., None, None, None]
    steps = [layout.to_time(v).unbind(1) for v in (x.to(dtype), delta, B, C)]
    shape = (layout.row.shape[0], *x.shape[1:], B.shape[-1])
    h = x.new_zeros(shape, dtype=dtype) if state is None else state.to(dtype)
    outputs = []
    for t, (x_t, delta_t, B_t, C_t) in enumerate(zip(*steps, strict=True)):  # (B, H, K), (B, H), (B, H, N) twice
        before = h.masked_fill(layout.first[:, t, None, None, None], 0.0)
        after = (
            torch.exp(delta_t * A)[..., None, None] * before + (delta_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        )
        h = torch.where(real[:, t], after, h)
        outputs.append((h * C_t[:, :, None]).sum(-1) + D[:, None] * x_t)
    return layout.to_rows(torch.stack(outputs, dim=1)).to(x.dtype), h
