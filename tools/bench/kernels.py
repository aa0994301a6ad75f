"""Kernels: selective scan, state-space dual and packed attention against other packages' forms and against the exact
one."""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.bench import packages, peers
from tools.bench.benchmark import (
    HIGHER,
    LOWER,
    Comparison,
    Goal,
    Group,
    Settings,
    TableRow,
    Unavailable,
    benchmark,
    goals,
    leaf,
)
from tools.bench.measure import BOTH, FORWARD, Variant, both_modes
from zoo import TokenContext, UserError
from zoo.kernels import chunked, cpu, per_document, reference, sdpa
from zoo.kernels.layout import Layout
from zoo.kernels.reference import masked_attention

STATES = 16
OURS, PLAIN = "C kernel", "plain PyTorch"


def compiled() -> types.ModuleType:
    """The compiled backend.

    Raises:
        Unavailable: it cannot be built here.
    """
    if cpu.missing():
        raise Unavailable(f"no compiled kernels: {cpu.missing()}")
    return cpu


def mamba_ssm(file: str, *names: str) -> list[Callable]:
    """Functions of mamba-ssm's Python files.

    Raises:
        Unavailable: its source is not here.
    """
    try:
        return peers.mamba_ssm(file, *names)
    except UserError as error:
        raise Unavailable(str(error)) from error


def scan_inputs(rows: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of `selective_scan` as a fresh Mamba layer has them: A = −1 … −N, steps Δ about 0.01."""
    values = {name: torch.randn(rows, width) for name in ("u", "dt", "z")}
    values |= {name: torch.randn(rows, STATES) for name in ("B", "C")}
    values |= {
        "bias": torch.full((1, width), -4.6),
        "A": -torch.arange(1.0, STATES + 1).expand(width, STATES).contiguous(),
        "D": torch.ones(width),
    }
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def one_document(rows: int, length: int) -> Layout:
    return Layout.of(TokenContext.from_modality(torch.zeros(rows, length, dtype=torch.int64)))


def by_channel(values: Tensor, rows: int) -> Tensor:
    """(B·T, W) → a leaf (B, W, T), the order in which mamba-ssm takes values."""
    return values.detach().view(rows, -1, values.shape[1]).transpose(1, 2).contiguous().requires_grad_()


@benchmark("scan.reference")
def scan_reference(settings: Settings) -> Group:
    """Selective scan, (2, 512, 256), N = 16, against mamba-ssm's selective_scan_ref; both in their native order."""
    rows, length, width = 2, settings.size(512), settings.size(256)
    layout, inputs = one_document(rows, length), scan_inputs(rows * length, width)
    (theirs,) = mamba_ssm("ops/selective_scan_interface.py", "selective_scan_ref")
    their = {name: by_channel(inputs[name], rows) for name in ("u", "dt", "B", "C", "z")}
    their |= {name: inputs[name] for name in ("A", "D")} | {"bias": inputs["bias"].detach()[0].requires_grad_()}
    order = [their[name] for name in ("u", "dt", "A", "B", "C", "D", "z", "bias")]
    kernel = compiled()
    variants = {
        OURS: Variant(lambda: kernel.selective_scan(**inputs, layout=layout)[0], list(inputs.values())),
        PLAIN: Variant(lambda: chunked.selective_scan(**inputs, layout=layout)[0], list(inputs.values())),
        "selective_scan_ref": Variant(lambda: theirs(*order, delta_softplus=True), order),
    }
    pairs = [
        Comparison(OURS, "selective_scan_ref", HIGHER, goals(both=Goal(target=200.0))),
        Comparison(PLAIN, "selective_scan_ref", HIGHER, goals(both=Goal(target=25.0))),
    ]
    return Group(both_modes(variants), pairs)


@benchmark("scan.fallback")
def scan_fallback(settings: Settings) -> Group:
    """Selective scan, (2, 1024, 1024), N = 16: without a compiler against with one, and the latter against its
    exponentials."""
    rows, length, width = 2, settings.size(1024), settings.size(1024)
    layout, inputs = one_document(rows, length), scan_inputs(rows * length, width)
    kernel, leaves = compiled(), list(inputs.values())
    variants = {
        OURS: Variant(lambda: kernel.selective_scan(**inputs, layout=layout)[0], leaves),
        PLAIN: Variant(lambda: chunked.selective_scan(**inputs, layout=layout)[0], leaves),
    }
    tasks = both_modes(variants)
    once = exponentials(rows * length * width * STATES)
    tasks[FORWARD]["its exponentials"] = once
    tasks[BOTH]["its exponentials"] = lambda: (once(), once())
    note = (
        "least time: torch.exp of as many numbers in cache, once forward, once more backward where states are "
        "recomputed"
    )
    pairs = [
        Comparison(PLAIN, OURS, goals=goals(both=Goal(target=5.0))),
        Comparison(OURS, "its exponentials", note=note, expected=1.0),
    ]
    return Group(tasks, pairs)


def exponentials(count: int, block: int = 1 << 16) -> Callable[[], None]:
    """A task that takes `count` exponentials of numbers that stay in the cache."""
    numbers, result = -torch.rand(min(block, count)), torch.empty(min(block, count))
    repeats = max(1, count // block)

    def task() -> None:
        for _ in range(repeats):
            torch.exp(numbers, out=result)

    return task


@benchmark("scan.error")
def scan_error(settings: Settings) -> Group:
    """Selective scan, (2, 512, 256), N = 16: relative error (L2) in fp32 against the definition in float64."""
    rows, length, width = 2, settings.size(512), settings.size(256)
    layout, inputs = one_document(rows, length), scan_inputs(rows * length, width)
    exact = _results(reference, inputs, layout, torch.float64)
    figures = []
    for name, kernel in ((OURS, compiled()), (PLAIN, chunked)):
        errors = {
            part: float((value.double() - exact[part]).norm() / exact[part].norm())
            for part, value in _results(kernel, inputs, layout, torch.float32).items()
        }
        result = errors.pop("y")
        worst = max(errors, key=errors.__getitem__)
        figures += [
            TableRow(f"y, {name}", FORWARD, None, None, result, LOWER, 1e-7, None),
            TableRow(
                f"gradients, {name}",
                BOTH,
                None,
                None,
                errors[worst],
                LOWER,
                1e-6,
                None,
                note=f"the worst is that of {worst}",
            ),
        ]
    return Group(figures=figures)


def _results(
    kernel: types.ModuleType, inputs: dict[str, Tensor], layout: Layout, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The output `y` and the gradient of every input, of an arbitrary but fixed function of the output."""
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in inputs.items()}
    y, _ = kernel.selective_scan(**leaves, layout=layout)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), direction)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@benchmark("ssd.minimal", peer="ssd_minimal_discrete", goal=Goal(1.3, 1.5))
@benchmark("ssd.transformers", peer="Transformers' chunk scan", goal=Goal())
def ssd(settings: Settings, peer: str, goal: Goal) -> Group:
    """Mamba-2's state-space dual, B=2 T=1024 H=16 K=64 N=64, chunks of 64, against another package's form in
    PyTorch."""
    rows, length, heads, width, states = 2, settings.size(1024), settings.size(16), 64, 64
    layout = one_document(rows, length)
    x, dt = leaf(rows * length, heads, width), leaf(rows * length, heads)
    B, C = leaf(rows * length, 1, states), leaf(rows * length, 1, states)
    bias = torch.full((1, heads), -4.6).requires_grad_()
    A, D = (-1 - 15 * torch.rand(heads)).requires_grad_(), torch.ones(heads).requires_grad_()
    inputs = [x, dt, bias, A, B, C, D]
    form = (minimal_form if peer == "ssd_minimal_discrete" else transformers_form)(min(64, length))

    def theirs() -> Tensor:
        values, steps, into, out = (value.view(rows, length, *value.shape[1:]) for value in (x, dt, B, C))
        return form(values, steps, bias[0], A, into, out, D)

    kernel = compiled()
    variants = {
        OURS: Variant(lambda: kernel.ssd(x, dt, bias, A, B, C, D, layout)[0], inputs),
        PLAIN: Variant(lambda: chunked.ssd(x, dt, bias, A, B, C, D, layout)[0], inputs),
        peer: Variant(theirs, inputs),
    }
    pairs = [Comparison(OURS, peer, HIGHER, goals(goal, goal)), Comparison(PLAIN, peer, HIGHER)]
    return Group(both_modes(variants), pairs)


def minimal_form(chunk: int) -> Callable[..., Tensor]:
    """mamba-ssm's minimal form, which leaves step sizes and skip to its caller; values (B, T, H, K)."""
    _, minimal = mamba_ssm("modules/ssd_minimal.py", "segsum", "ssd_minimal_discrete")

    def form(x: Tensor, dt: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        delta = F.softplus(dt + bias)
        B, C = (value.expand(-1, -1, x.shape[2], -1) for value in (B, C))
        return minimal(x * delta.unsqueeze(-1), delta * A, B, C, chunk)[0] + D[:, None] * x

    return form


def transformers_form(chunk: int) -> Callable[..., Tensor]:
    """Transformers' chunk scan; values (B, T, H, K)."""
    scan = packages.chunk_scan()

    def form(x: Tensor, dt: Tensor, bias: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return scan(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True)

    return form


LENGTHS = (512, 256, 768, 128, 384)


@benchmark("attention.packed")
def packed_attention(settings: Settings) -> Group:
    """Five packed documents, H=8 K=64 T=2048: attention document by document against a bool mask."""
    lengths = [settings.size(length) for length in LENGTHS]
    document = torch.cat([torch.full((length,), d) for d, length in enumerate(lengths)]).unsqueeze(0)
    context = TokenContext.from_modality(torch.zeros_like(document), document)
    query, key, value = inputs = [leaf(1, document.shape[1], 8, 64) for _ in range(3)]
    variants = {
        "per document": Variant(lambda: per_document.packed_attention(query, key, value, context), inputs),
        "bool mask": Variant(lambda: sdpa.packed_attention(query, key, value, context), inputs),
        "no fused kernel": Variant(lambda: masked_attention(query, key, value, context.mask), inputs),
    }
    goal = Goal(target=3.0)
    pairs = [
        Comparison("per document", "bool mask", HIGHER, goals(goal, goal)),
        Comparison("per document", "no fused kernel", HIGHER),
    ]
    return Group(both_modes(variants), pairs)
