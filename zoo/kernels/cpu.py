"""Scan, state-space dual and causal convolution on a CPU: C kernels compiled at first use, forward and backward in
fp32.

They step through rows by index, so that values sorted by modality need no gather. bf16 comes in and goes out and is
computed in fp32. float64, and any other device, takes `chunked`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zoo.kernels import chunked, compiled
from zoo.kernels.layout import Layout, causal_window

CHUNK, LANES, GROUP = 16, 16, 8
"""As in csrc/scan.c: one state is kept every CHUNK steps; a task has GROUP blocks of LANES channels."""


@functools.cache
def missing() -> str | None:
    """Why this backend does not work here; None where it does."""
    try:
        compiled.load("conv.c", TAPS=4)
    except compiled.CompileError as error:
        return str(error)
    return None


def _supported(*tensors: Tensor) -> bool:
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors)


def _row_major(values: Tensor) -> Tensor:
    """fp32 with neighbouring numbers in a row; rows may lie apart (a slice of a wider tensor needs no copy)."""
    values = values.float()
    return values if values.stride(-1) == 1 and values.stride(0) >= values.shape[-1] else values.contiguous()


def _rows(layout: Layout, *shape: int) -> Tensor:
    """Memory for one result a row; 0 where the kernel writes nothing."""
    return torch.zeros(shape) if layout.padded else torch.empty(shape)


class Arguments:
    """The C structure of a kernel, filled by name; keeps its tensors alive through the call."""

    def __init__(self, layout: Layout, **values: int | Tensor | None) -> None:
        self.values: dict[str, int | Tensor | None] = {
            "threads": torch.get_num_threads(),
            "batch": layout.row.shape[0],
            "steps": layout.row.shape[1],
            "row": layout.row,
            "first": layout.first,
            "count": layout.count,
            "group": layout.group,
            **values,
        }

    def call(self, function: Any, fields: Sequence[str]) -> int:
        """Call `function`, of a library loaded by ctypes, with a pointer to the structure of these 8-byte fields, in
        order."""
        words = (ctypes.c_int64 * len(fields))()
        for i, name in enumerate(fields):
            value = self.values.get(name)
            words[i] = value.data_ptr() if isinstance(value, Tensor) else value or 0
        function.restype = ctypes.c_int
        return function(words)


def _succeed(status: int) -> None:
    if status:
        raise MemoryError("a kernel found no memory for its scratch space")


CONV_FIELDS = ("threads batch steps channels row first count x x_stride weight bias y dy dx dweight dbias").split()
SCAN_FIELDS = (
    "threads batch steps channels rows groups row first count group u dt z u_stride dt_stride z_stride B C B_stride "
    "C_stride bias A D initial y final saved dy dfinal du ddt dz dB dC dA dD dbias dinitial"
).split()


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> Tensor:
        y = _rows(layout, *x.shape)
        arguments = _conv_arguments(layout, x, weight, bias, y=y)
        arguments.call(compiled.load("conv.c", TAPS=weight.shape[1]).conv_forward, CONV_FIELDS)
        ctx.save_for_backward(x, weight, bias)
        ctx.layout = layout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight, bias = ctx.saved_tensors
        layout, sequences = ctx.layout, ctx.layout.row.shape[0]
        dx, dweight, dbias = (
            _rows(layout, *x.shape),
            x.new_empty(sequences, *weight.shape),
            x.new_empty(sequences, *bias.shape),
        )
        arguments = _conv_arguments(layout, x, weight, bias, dy=dy.contiguous(), dx=dx, dweight=dweight, dbias=dbias)
        arguments.call(compiled.load("conv.c", TAPS=weight.shape[1]).conv_backward, CONV_FIELDS)
        return dx, dweight.sum(0), dbias.sum(0), None


def _conv_arguments(layout: Layout, x: Tensor, weight: Tensor, bias: Tensor, **more: Tensor) -> Arguments:
    return Arguments(layout, channels=x.shape[1], x=x, x_stride=x.stride(0), weight=weight, bias=bias, **more)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, layout: Layout, window: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """As `reference.causal_conv1d`."""
    if not _supported(x):
        return chunked.causal_conv1d(x, weight, bias, layout, window)
    rows = x
    if window is not None:
        rows, layout, window = causal_window(x, layout, window)
    y = _Conv.apply(_row_major(rows), weight.float().contiguous(), bias.float().contiguous(), layout)
    return y[: x.shape[0]].to(x.dtype), window


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        u, _, _, A, *_ = inputs
        sequences, (channels, states) = layout.row.shape[0], A.shape
        y, final = _rows(layout, *u.shape), u.new_empty(sequences, channels, states)
        saved = None
        if any(ctx.needs_input_grad):
            blocks = -(-channels // LANES)
            saved = u.new_empty(sequences, -(-layout.row.shape[1] // CHUNK), blocks, states, LANES)
        arguments = _scan_arguments(layout, state, inputs, y=y, final=final, saved=saved)
        arguments.call(compiled.load("scan.c", STATE=states).scan_forward, SCAN_FIELDS)
        ctx.save_for_backward(*inputs, state, saved)
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, state, saved = ctx.saved_tensors
        u, _, bias, A, B, *_ = inputs
        layout, sequences = ctx.layout, ctx.layout.row.shape[0]
        dy = torch.zeros_like(u, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
        parts = -(-u.shape[1] // (LANES * GROUP))
        du, ddt, dz = (_rows(layout, *u.shape) for _ in range(3))
        dB, dC = (_rows(layout, parts, *B.shape) for _ in range(2))
        dA, dinitial = (u.new_empty(sequences, *A.shape) for _ in range(2))
        dD, dbias = u.new_empty(sequences, u.shape[1]), u.new_zeros(sequences, *bias.shape)
        arguments = _scan_arguments(
            layout,
            state,
            inputs,
            saved=saved,
            dy=dy,
            dfinal=None if dfinal is None else dfinal.contiguous(),
            du=du,
            ddt=ddt,
            dz=dz,
            dB=dB,
            dC=dC,
            dA=dA,
            dD=dD,
            dbias=dbias,
            dinitial=dinitial,
        )
        _succeed(arguments.call(compiled.load("scan.c", STATE=A.shape[1]).scan_backward, SCAN_FIELDS))
        sums = dbias.sum(0), dA.sum(0), dB.sum(0), dC.sum(0), dD.sum(0)
        return None, None if state is None else dinitial, du, ddt, *sums, dz


def _scan_arguments(layout: Layout, state: Tensor | None, inputs: Sequence[Tensor], **more: Tensor | None) -> Arguments:
    u, dt, bias, A, B, C, D, z = inputs
    tensors = {"u": u, "dt": dt, "z": z, "B": B, "C": C}
    strides = {f"{name}_stride": value.stride(0) for name, value in tensors.items()}
    return Arguments(
        layout,
        channels=u.shape[1],
        rows=u.shape[0],
        groups=bias.shape[0],
        **tensors,
        **strides,
        bias=bias,
        A=A,
        D=D,
        initial=state,
        **more,
    )


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
    if not _supported(u, dt, B, C, z):
        return chunked.selective_scan(u, dt, bias, A, B, C, D, z, layout, state)
    u32, dt, B, C, z = (_row_major(value) for value in (u, dt, B, C, z))
    bias, A, D = (value.float().contiguous() for value in (bias, A, D))
    state = None if state is None else state.float().contiguous()
    y, final = _Scan.apply(layout, state, u32, dt, bias, A, B, C, D, z)
    return y.to(u.dtype), final


SSD_FIELDS = (
    "threads batch steps heads width sets rows groups row first count group x dt B C x_stride dt_stride B_stride "
    "C_stride bias A D initial y final saved dy dfinal dx ddt dB dC dA dD dbias dinitial"
).split()
SSD_CHUNK, SSD_HEADS = 32, 4
"""As in csrc/ssd.c."""


class _Dual(torch.autograd.Function):
    """x (R, H·K), B and C (R, S·N): heads and sets side by side, so that slices of a wider tensor need no copy."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, sets: int, state: Tensor | None, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, _, _, B, *_ = inputs
        sequences, heads, states = layout.row.shape[0], dt.shape[1], B.shape[1] // sets
        width = x.shape[1] // heads
        y, final = _rows(layout, *x.shape), x.new_empty(sequences, heads, width, states)
        saved = None
        if any(ctx.needs_input_grad):
            chunks = -(-layout.row.shape[1] // SSD_CHUNK)
            saved = x.new_empty(sequences, chunks, heads, width, -(-states // LANES) * LANES)
        arguments = _ssd_arguments(layout, sets, state, inputs, y=y, final=final, saved=saved)
        _succeed(arguments.call(compiled.load("ssd.c", STATE=states).ssd_forward, SSD_FIELDS))
        ctx.save_for_backward(*inputs, state, saved)
        ctx.layout, ctx.sets = layout, sets
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dy: Tensor | None, dfinal: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *inputs, state, saved = ctx.saved_tensors
        x, dt, bias, _, B, *_ = inputs
        layout, sequences, sets, heads = ctx.layout, ctx.layout.row.shape[0], ctx.sets, dt.shape[1]
        states = B.shape[1] // sets
        dy = torch.zeros_like(x, memory_format=torch.contiguous_format) if dy is None else dy.contiguous()
        parts = -(-heads // sets // SSD_HEADS)
        dx, ddt = _rows(layout, *x.shape), _rows(layout, *dt.shape)
        dB, dC = (_rows(layout, sets, parts, x.shape[0], states) for _ in range(2))
        dA, dD = (x.new_empty(sequences, heads) for _ in range(2))
        dbias, dinitial = (
            x.new_zeros(sequences, *bias.shape),
            x.new_empty(sequences, heads, x.shape[1] // heads, states),
        )
        arguments = _ssd_arguments(
            layout,
            sets,
            state,
            inputs,
            saved=saved,
            dy=dy,
            dfinal=None if dfinal is None else dfinal.contiguous(),
            dx=dx,
            ddt=ddt,
            dB=dB,
            dC=dC,
            dA=dA,
            dD=dD,
            dbias=dbias,
            dinitial=dinitial,
        )
        _succeed(arguments.call(compiled.load("ssd.c", STATE=states).ssd_backward, SSD_FIELDS))
        dB, dC = (d.sum(1).transpose(0, 1).reshape(B.shape) for d in (dB, dC))
        sums = dbias.sum(0), dA.sum(0), dB, dC, dD.sum(0)
        return None, None, None if state is None else dinitial, dx, ddt, *sums


def _ssd_arguments(
    layout: Layout, sets: int, state: Tensor | None, inputs: Sequence[Tensor], **more: Tensor | None
) -> Arguments:
    x, dt, bias, A, B, C, D = inputs
    tensors = {"x": x, "dt": dt, "B": B, "C": C}
    strides = {f"{name}_stride": value.stride(0) for name, value in tensors.items()}
    heads = dt.shape[1]
    return Arguments(
        layout,
        heads=heads,
        width=x.shape[1] // heads,
        sets=sets,
        rows=x.shape[0],
        groups=bias.shape[0],
        **tensors,
        **strides,
        bias=bias,
        A=A,
        D=D,
        initial=state,
        **more,
    )


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
    """As `reference.ssd`."""
    if not _supported(x, dt, B, C):
        return chunked.ssd(x, dt, bias, A, B, C, D, layout, state)
    flat, dt, B_flat, C_flat = (_row_major(v.flatten(1)) for v in (x, dt, B, C))
    bias, A, D = (value.float().contiguous() for value in (bias, A, D))
    state = None if state is None else state.float().contiguous()
    y, final = _Dual.apply(layout, B.shape[1], state, flat, dt, bias, A, B_flat, C_flat, D)
    return y.to(x.dtype).view_as(x), final
