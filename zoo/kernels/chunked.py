"""Scan, state-space dual and causal convolution in plain PyTorch, on any device, in bounded memory.

The scan keeps one state a chunk and computes the others again in a backward pass written by hand: autograd would keep
every step, and indexing a tensor step by step makes each gradient a zero tensor the size of all steps.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels.layout import Layout, causal_window

CHUNK = 16
"""Steps of a scan that are in memory at once, each with all its states."""
FORGET = 1e30
"""Δ of the decay at a document's beginning: exp(Δ A) is 0 for any |A| above 1e-28."""


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, window: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `reference.causal_conv1d`: one shifted multiply-add a tap."""
    if window is not None:
        rows, layout, window = causal_window(x, layout, window)
        return causal_conv1d(rows, weight, bias, layout)[0][: x.shape[0]], window
    values, taps = layout.to_time(x), weight.shape[1]
    total = torch.addcmul(bias, values, weight[:, -1])
    for j in range(1, min(taps, values.shape[1])):
        same = (layout.document[:, j:] == layout.document[:, :-j]).unsqueeze(-1)
        reached = (values[:, :-j] * same) * weight[:, taps - 1 - j]
        total = total + F.pad(reached, (0, 0, j, 0))
    return layout.to_rows(F.silu(total)), None


class _Recurrence(torch.autograd.Function):
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t and y_t = C_t · h_t over time-first values; channels last, they are
    many."""

    @staticmethod
    def forward(
        ctx: Any, delta: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, first: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """delta, u (T, B, W); A (N, W); B, C (T, B, N); first (T, B); state (B, N, W).

        Returns:
            y (T, B, W) and h after the last step (B, N, W).
        """
        reset = delta.masked_fill(first.unsqueeze(-1), FORGET)
        y, h, saved = torch.empty_like(u), state, []
        for start in range(0, len(u), CHUNK):
            part = slice(start, start + CHUNK)
            saved.append(h)
            states, _ = _chunk(reset[part], delta[part] * u[part], A, B[part], h)
            y[part] = torch.matmul(C[part].unsqueeze(2), states).squeeze(2)
            h = states[-1].clone()
        ctx.save_for_backward(delta, reset, u, A, B, C, *saved)
        return y, h

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dy: Tensor, dh: Tensor
    ) -> tuple[Tensor | None, ...]:
        delta, reset, u, A, B, C, *saved = ctx.saved_tensors
        d_delta, du, dB, dC = (torch.empty_like(v) for v in (delta, u, B, C))
        dA = torch.zeros_like(A)
        for chunk in reversed(range(len(saved))):
            part = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            inputs = delta[part] * u[part]
            states, decay = _chunk(reset[part], inputs, A, B[part], saved[chunk])
            dC[part] = torch.matmul(states, dy[part].unsqueeze(-1)).squeeze(-1)
            gradient = C[part].unsqueeze(-1) * dy[part].unsqueeze(2)  # of the states: (chunk, B, N, W)
            steps, decays = gradient.unbind(0), decay.unbind(0)
            steps[-1].add_(dh)
            for t in range(len(steps) - 2, -1, -1):
                steps[t].addcmul_(decays[t + 1], steps[t + 1])
            dh = steps[0] * decays[0]
            input_gradient = torch.matmul(B[part].unsqueeze(2), gradient).squeeze(2)
            dB[part] = torch.matmul(gradient, inputs.unsqueeze(-1)).squeeze(-1)
            gradient *= decay  # from here on of exp(ΔA), times itself and the state before
            gradient[1:] *= states[:-1]
            gradient[0] *= saved[chunk]
            torch.mul(gradient, A, out=decay)
            d_delta[part] = torch.addcmul(decay.sum(2), input_gradient, u[part])
            du[part] = input_gradient * delta[part]
            dA += gradient.mul_(delta[part].unsqueeze(2)).sum((0, 1))
        return d_delta, du, dA, dB, dC, None, dh


def _chunk(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The states of a chunk's steps and their decays, both (chunk, B, N, W); a decay of 0 is a document's beginning."""
    decay = (delta.unsqueeze(2) * A).exp_()
    states = B.unsqueeze(-1) * inputs.unsqueeze(2)
    for step, by in zip(states.unbind(0), decay.unbind(0), strict=True):
        h = step.addcmul_(by, h)
    return states, decay


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
    """As `reference.selective_scan`."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    wide = u.to(dtype)
    delta = F.softplus(layout.biased(dt.to(dtype), bias.to(dtype)))
    # steps after a sequence's last token have Δ = 0: they leave the state as it is
    times = [layout.to_time(v).transpose(0, 1).contiguous() for v in (delta, wide, B.to(dtype), C.to(dtype))]
    channels, states = A.shape
    if state is None:
        h = wide.new_zeros(layout.row.shape[0], states, channels)
    else:
        h = state.to(dtype).transpose(1, 2).contiguous()
    y, h = _Recurrence.apply(*times[:2], A.to(dtype).T.contiguous(), *times[2:], layout.first.T, h)
    y = layout.to_rows(torch.addcmul(y, times[1], D.to(dtype)).transpose(0, 1))
    return (y * F.silu(z.to(dtype))).to(u.dtype), h.transpose(1, 2)


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
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """As `reference.ssd`: inside a chunk of steps batched products, from chunk to chunk the state.

    Every exponent is masked before its exponential, which would overflow where it looks ahead. Exponents are
    differences of sums of Δ A in float64: after a large step, fp32 would keep nothing of small ones.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    delta = F.softplus(layout.biased(dt.to(dtype), bias.to(dtype)))
    wide, chunks = x.to(dtype), _Chunks.of(layout, chunk)
    inputs = chunks.cut(wide * delta.unsqueeze(-1)).transpose(2, 3)  # (B, c, H, chunk, K)
    into, out = (chunks.cut(v.to(dtype)).transpose(2, 3) for v in (B, C))  # (B, c, S, chunk, N)
    decay = chunks.cut(delta * A).transpose(2, 3).double().cumsum(-1)  # (B, c, H, chunk)
    spans = (decay[..., :, None] - decay[..., None, :]).to(dtype).masked_fill(~chunks.seen.unsqueeze(2), -torch.inf)
    y = (_by_head(out @ into.transpose(-1, -2), x.shape[1]) * spans.exp()) @ inputs
    h = wide.new_zeros(len(layout.row), *x.shape[1:], B.shape[2]) if state is None else state.to(dtype)
    entering, h = _states(inputs, into, decay, chunks, h)
    reached = decay.to(dtype).masked_fill(~chunks.entered.unsqueeze(2), -torch.inf).exp().unsqueeze(-1)
    y = y + (_by_head(out, x.shape[1]) @ entering.transpose(-1, -2)) * reached
    skip = D.to(dtype)[:, None] * wide
    if layout.padded:
        skip = skip.masked_fill((layout.step == layout.row.numel())[:, None, None], 0.0)
    return (layout.to_rows(chunks.joined(y.transpose(2, 3))) + skip).to(x.dtype), h


@dataclasses.dataclass(frozen=True, eq=False)
class _Chunks:
    """B sequences of T steps, cut into c chunks; and which steps of a chunk share a document. Build with `of`."""

    layout: Layout
    size: int
    """Steps of a chunk. The last one of a sequence is filled up."""
    seen: Tensor
    """(B, c, size, size) bool: step t sees step s of its chunk, s ≤ t, as both are of one document."""
    entered: Tensor
    """(B, c, size) bool: the step is of the document with which the chunk before ended, and sees the state it left."""
    left: Tensor
    """(B, c, size) bool: the step is of the document with which its chunk ends, and counts in the state it leaves."""

    @classmethod
    def of(cls, layout: Layout, size: int) -> _Chunks:
        extra = -layout.row.shape[1] % size
        document = F.pad(layout.document, (0, extra), mode="replicate") if extra else layout.document
        document = document.view(len(document), -1, size)
        causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
        seen = causal & (document[..., :, None] == document[..., None, :])
        before = torch.cat((torch.zeros_like(document[:, :1, -1]), document[:, :-1, -1]), dim=1)[..., None]
        return cls(layout, size, seen, document == before, document == document[..., -1:])

    def cut(self, values: Tensor) -> Tensor:
        """(R, …) → (B, c, size, …), with zeros after the last token: Δ = 0 leaves the state as it is."""
        values = self.layout.to_time(values)
        extra = -values.shape[1] % self.size
        if extra:
            values = torch.cat((values, values.new_zeros(len(values), extra, *values.shape[2:])), dim=1)
        return values.view(len(values), -1, self.size, *values.shape[2:])

    def joined(self, values: Tensor) -> Tensor:
        """(B, c, size, …) → (B, T, …)."""
        return values.reshape(len(values), -1, *values.shape[3:])[:, : self.layout.row.shape[1]]


def _states(inputs: Tensor, into: Tensor, decay: Tensor, chunks: _Chunks, h: Tensor) -> tuple[Tensor, Tensor]:
    """From chunk to chunk: the states that enter them (B, c, H, K, N), and the last one (B, H, K, N).

    Args:
        inputs: (B, c, H, chunk, K), Δ x.
        into: (B, c, S, chunk, N), B of every set.
        decay: (B, c, H, chunk) float64, Σ Δ A from the chunk's first step on.
        h: (B, H, K, N) the first state.
    """
    last = decay[..., -1:]
    kept = (last - decay).to(inputs.dtype).masked_fill(~chunks.left.unsqueeze(2), -torch.inf).exp()
    added = (inputs * kept.unsqueeze(-1)).transpose(-1, -2) @ _by_head(into, inputs.shape[2])  # (B, c, H, K, N)
    carried = last.to(inputs.dtype).masked_fill(~chunks.entered[..., -1:].unsqueeze(2), -torch.inf).exp().unsqueeze(-1)
    entering = []
    for addition, factor in zip(added.unbind(1), carried.unbind(1), strict=True):
        entering.append(h)
        h = torch.addcmul(addition, h, factor)
    return torch.stack(entering, dim=1), h


def _by_head(values: Tensor, heads: int) -> Tensor:
    """(B, c, S, …) → (B, c, H, …), without a copy where one set serves all heads."""
    sets = values.shape[2]
    if sets == 1:
        return values.expand(-1, -1, heads, *values.shape[3:])
    return values.repeat_interleave(heads // sets, dim=2)
