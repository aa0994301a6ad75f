"""Every backend of scan, state-space dual and causal convolution against the reference, and the reference against a
loop.

The table `CASES` and `zoo.kernels.OPERATIONS` make the tests: a new backend is tested by being registered.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.zoo.helpers import assert_equal, random_rows, stream
from tools.bench import peers
from zoo import ConfigError, TokenContext, UserError, kernels
from zoo.kernels import OPERATIONS, chunked, compiled, cpu, mamba_ssm, reference
from zoo.kernels.layout import Layout
from zoo.untied import Grouping

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative to the largest entry, or to 1: a gradient that is 0 by cancellation is 0 up to rounding."""
needs_compiler = pytest.mark.skipif(cpu.missing() is not None, reason=f"no compiled kernels: {cpu.missing()}")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64)


def assert_near(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        largest = max(1.0, float(theirs[name].detach().abs().max())) if value.numel() else 1.0
        torch.testing.assert_close(
            value, theirs[name], rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


def layout_of(*rows: str, grouped: bool = False, continued: bool = False) -> Layout:
    """Layout of rows drawn as in `stream`; `grouped`: rows are sorted by modality; `continued`: document 0 has
    begun."""
    context = stream(*rows)
    before = torch.zeros(context.shape[0], dtype=torch.int64) if continued else None
    return Layout.of(context, Grouping.of(context.modalities, untied=grouped), before)


def scan_inputs(layout: Layout, state: bool, width: int = 21, states: int = 5) -> dict[str, Tensor]:
    rows, groups = layout.rows, int(layout.group.max()) + 1 if layout.rows else 1
    inputs = {
        "u": random(rows, width),
        "dt": random(rows, width) - 1,
        "bias": random(groups, width),
        "A": -0.05 - 8 * positive(width, states),
        "B": random(rows, states),
        "C": random(rows, states),
        "D": random(width),
        "z": random(rows, width),
    }
    return inputs | ({"state": random(layout.row.shape[0], width, states)} if state else {})


def ssd_inputs(
    layout: Layout, state: bool, heads: int = 6, width: int = 5, sets: int = 2, states: int = 7
) -> dict[str, Tensor]:
    rows, groups = layout.rows, int(layout.group.max()) + 1 if layout.rows else 1
    inputs = {
        "x": random(rows, heads, width),
        "dt": random(rows, heads) - 1,
        "bias": random(groups, heads),
        "A": -0.05 - 4 * positive(heads),
        "B": random(rows, sets, states),
        "C": random(rows, sets, states),
        "D": random(heads),
    }
    return inputs | ({"state": random(layout.row.shape[0], heads, width, states)} if state else {})


def conv_inputs(layout: Layout, state: bool, width: int = 24, taps: int = 4) -> dict[str, Tensor]:
    inputs = {"x": random(layout.rows, width), "weight": random(width, taps), "bias": random(width)}
    return inputs | ({"state": random(layout.row.shape[0], taps - 1, width)} if state else {})


Case = Callable[[], tuple[Layout, dict[str, Tensor]]]


def case(make: Callable, *rows: str, grouped: bool = False, state: bool = False, **sizes: int) -> Case:
    def build() -> tuple[Layout, dict[str, Tensor]]:
        layout = layout_of(*rows, grouped=grouped, continued=state)
        return layout, make(layout, state, **sizes)

    return build


def cases(make: Callable, **special: Case) -> dict[str, Case]:
    """What every operation is tested on."""
    return {
        "one document": case(make, "ttiitti", "tttttti"),
        "one token": case(make, "t"),
        "one token of a sequence that went on before": case(make, "t", "i", state=True),
        "documents": case(make, "tti|t|itt", "t|tiit|ti", "ttiitti"),
        "padding": case(make, "tti|tt..", "...tt|ti", "........", "ttiit..."),
        "nothing but padding": case(make, "...", grouped=True),
        "state": case(make, "tti|tt..", "...ttiti", "........", "|ttiit...", state=True),
        "sorted by modality": case(make, "tti|tt..", "iiiiiiii", "...tt|ti", "ttiitiit", grouped=True),
        "sorted, with state": case(make, "tti|tt..", "iiiiiiii", "........", grouped=True, state=True),
        "long odd lengths": case(make, *random_rows(3, 107), grouped=True, state=True),
        "a chunk of every length": case(make, "t" * 64 + "i" * 33, "t" * 16 + "|" + "t" * 16 + "|" + "t" * 65),
    } | special


CASES: dict[tuple[str, str], dict[str, Case]] = {
    ("scan", "selective_scan"): cases(
        scan_inputs,
        wide=case(scan_inputs, "ttiit|ti", grouped=True, width=150, states=16),
        many_states=case(scan_inputs, "ttiit|ti", width=4, states=33),
    ),
    ("ssd", "ssd"): cases(
        ssd_inputs,
        wide=case(ssd_inputs, "ttiit|ti", grouped=True, heads=9, width=16, sets=1, states=64),
        many_states=case(ssd_inputs, "ttiit|ti", heads=2, width=3, sets=2, states=130),
    ),
    ("conv", "causal_conv1d"): cases(
        conv_inputs,
        wide=case(conv_inputs, "ttiit|ti", grouped=True, width=280),
        two_taps=case(conv_inputs, "ttiit|ti", state=True, taps=2),
        six_taps=case(conv_inputs, "ttiit|ti", state=True, taps=6),
    ),
}
BACKENDS = [
    pytest.param(operation, backend, function, name, id=f"{function}-{backend}-{name}")
    for (operation, function), table in CASES.items()
    for backend in OPERATIONS[operation]
    for name in table
    if backend not in ("reference", "mamba_ssm")
]


def run(
    module: types.ModuleType,
    function: str,
    layout: Layout,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    device: str = "cpu",
    through_final: bool = True,
) -> dict[str, Tensor]:
    """Output, state, and the gradient of every input, in float64.

    Args:
        through_final: whether gradients also come from the final state.
    """
    leaves = {name: x.to(device, dtype).requires_grad_() for name, x in inputs.items()}
    values = [x for name, x in leaves.items() if name != "state"]
    y, state = getattr(module, function)(*values, layout, leaves.get("state"))
    results = {"y": y, "final": state} if state is not None else {"y": y}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for name, value in results.items():
        if value.requires_grad and (through_final or name == "y"):
            probe = torch.linspace(-1, 1, value.numel(), dtype=torch.float64, device=device).view(value.shape)
            loss = loss + (value.to(torch.float64) * probe).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=not y.numel())
    results |= {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: value.detach().to("cpu", torch.float64) for name, value in results.items()}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("operation", "backend", "function", "name"), BACKENDS)
def test_backend_is_the_reference(operation, backend, function, name, dtype):
    if backend == "cpu" and cpu.missing():
        pytest.skip(f"no compiled kernels: {cpu.missing()}")
    layout, inputs = CASES[operation, function][name]()
    inputs = {key: x.to(dtype).to(torch.float64) for key, x in inputs.items()}  # the same numbers for both
    ours = run(OPERATIONS[operation][backend], function, layout, inputs, dtype)
    assert_near(ours, run(reference, function, layout, inputs, torch.float64), TOLERANCES[dtype])


def on_cuda(layout: Layout) -> Layout:
    fields = {name: value for name, value in vars(layout).items() if name in Layout.__dataclass_fields__}
    return Layout(**{name: v.cuda() if isinstance(v, Tensor) else v for name, v in fields.items()})


def check_mamba_ssm(
    function: str, layout: Layout, inputs: dict[str, Tensor], dtype: torch.dtype, deterministic: bool
) -> None:
    """Output, final state and all gradients of the packages' kernels are the definition's."""
    if mamba_ssm.missing():
        pytest.skip(str(mamba_ssm.missing()))
    inputs = {key: x.to(dtype).to(torch.float64) for key, x in inputs.items()}
    through_final = function != "selective_scan" or "state" in inputs  # the scan's final state carries no gradient
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        ours = run(mamba_ssm, function, on_cuda(layout), inputs, dtype, "cuda", through_final)
    finally:
        torch.use_deterministic_algorithms(False)
    theirs = run(reference, function, layout, inputs, torch.float64, through_final=through_final)
    assert_near(ours, theirs, 10 * TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("operation", "function", "name"), [(*key, name) for key, table in CASES.items() for name in table]
)
def test_mamba_ssm_is_the_reference(operation, function, name, dtype, deterministic):
    layout, inputs = CASES[operation, function][name]()
    if function == "ssd":  # the kernels want powers of two
        inputs = ssd_inputs(layout, "state" in name, heads=4, width=32, sets=2, states=32)
    check_mamba_ssm(function, layout, inputs, dtype, deterministic)


@pytest.mark.gpu
@pytest.mark.parametrize("documents", [1, 7])
@pytest.mark.parametrize("length", [2_049, 4_096])
@pytest.mark.parametrize("function", ["selective_scan", "ssd"])
def test_mamba_ssm_at_lengths_past_one_chunk_is_the_chunked_form(function, length, documents):
    """Against the plain PyTorch form on the same device in fp32: the definition would step through each token."""
    if mamba_ssm.missing():
        pytest.skip(str(mamba_ssm.missing()))
    bounds = torch.linspace(0, length, documents + 1).long().tolist()
    text = "|".join("t" * (stop - start) for start, stop in zip(bounds, bounds[1:], strict=False))
    layout = layout_of(text, text)
    made = scan_inputs(layout, False) if function == "selective_scan" else ssd_inputs(layout, False, 4, 32, 2, 32)
    inputs = {key: x.to(torch.float32) for key, x in made.items()}
    through_final = function == "ssd"
    ours, theirs = (
        run(module, function, on_cuda(layout), inputs, torch.float32, "cuda", through_final)
        for module in (mamba_ssm, chunked)
    )
    assert_near(ours, theirs, 1e-2)


def steps_of(layout: Layout) -> list[tuple[int, list[tuple[int, bool]]]]:
    """For each sequence its (row, begins a document)."""
    rows, first = layout.row.tolist(), layout.first.tolist()
    return [(b, [(r, f) for r, f in zip(rows[b], first[b], strict=True) if r >= 0]) for b in range(len(rows))]


@pytest.mark.parametrize("name", ["padding", "sorted, with state"])
def test_reference_scan_is_a_loop(name):
    layout, inputs = CASES["scan", "selective_scan"][name]()
    state = inputs.get("state", torch.zeros(layout.row.shape[0], *inputs["A"].shape, dtype=torch.float64))
    y, final = reference.selective_scan(*(v for k, v in inputs.items() if k != "state"), layout, inputs.get("state"))
    u, dt, bias, A, B, C, D, z = (v.numpy() for k, v in inputs.items() if k != "state")
    expected, group = np.zeros_like(u), layout.group.numpy()
    for b, steps in steps_of(layout):
        h = state[b].numpy().copy()
        for r, begins in steps:
            h = np.zeros_like(h) if begins else h
            for w in range(u.shape[1]):
                delta = np.log1p(np.exp(dt[r, w] + bias[group[r], w]))
                h[w] = np.exp(delta * A[w]) * h[w] + delta * B[r] * u[r, w]
                expected[r, w] = (C[r] @ h[w] + D[w] * u[r, w]) * z[r, w] / (1 + np.exp(-z[r, w]))
        np.testing.assert_allclose(final[b].numpy(), h, atol=1e-13)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("name", ["padding", "sorted, with state"])
def test_reference_ssd_is_a_loop(name):
    layout, inputs = CASES["ssd", "ssd"][name]()
    y, final = reference.ssd(*(v for k, v in inputs.items() if k != "state"), layout, inputs.get("state"))
    x, dt, bias, A, B, C, D = (v.numpy() for k, v in inputs.items() if k != "state")
    expected, group = np.zeros_like(x), layout.group.numpy()
    for b, steps in steps_of(layout):
        h = inputs["state"][b].numpy().copy() if "state" in inputs else np.zeros(final.shape[1:])
        for r, begins in steps:
            h = np.zeros_like(h) if begins else h
            for head in range(x.shape[1]):
                delta, one = np.log1p(np.exp(dt[r, head] + bias[group[r], head])), head // (x.shape[1] // B.shape[1])
                h[head] = np.exp(delta * A[head]) * h[head] + delta * np.outer(x[r, head], B[r, one])
                expected[r, head] = h[head] @ C[r, one] + D[head] * x[r, head]
        np.testing.assert_allclose(final[b].numpy(), h, atol=1e-13)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("name", ["padding", "sorted, with state", "six_taps"])
def test_reference_convolution_is_a_loop(name):
    layout, inputs = CASES["conv", "causal_conv1d"][name]()
    y, window = reference.causal_conv1d(*(v for k, v in inputs.items() if k != "state"), layout, inputs.get("state"))
    x, weight, bias = (inputs[key].numpy() for key in ("x", "weight", "bias"))
    expected, taps = np.zeros_like(x), weight.shape[1]
    for b, steps in steps_of(layout):
        past = list(inputs["state"][b].numpy()) if "state" in inputs else [np.zeros(x.shape[1])] * (taps - 1)
        for r, begins in steps:
            past = ([np.zeros(x.shape[1])] * taps if begins else past)[-(taps - 1) :] + [x[r]]
            total = bias + sum(weight[:, i] * past[i] for i in range(taps))
            expected[r] = total / (1 + np.exp(-total))
        if window is not None:
            np.testing.assert_allclose(window[b].numpy(), np.stack(past[-(taps - 1) :]), atol=1e-13)
    assert (window is None) == ("state" not in inputs)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-13)


@pytest.mark.parametrize("backend", [reference, chunked], ids=["reference", "chunked"])
@pytest.mark.parametrize(
    ("function", "make", "sizes"),
    [
        ("selective_scan", scan_inputs, {"width": 2, "states": 3}),
        ("ssd", ssd_inputs, {"heads": 2, "width": 2, "sets": 1, "states": 3}),
        ("causal_conv1d", conv_inputs, {"width": 2, "taps": 3}),
    ],
)
def test_gradients_are_finite_differences(backend, function, make, sizes):
    layout, inputs = case(make, "ti|t.", "..itt", grouped=True, state=True, **sizes)()
    names = [name for name in inputs if name != "state"]

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(backend, function)(*values[: len(names)], layout, values[len(names)])

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs.values()], atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("operation", "function"), CASES)
def test_documents_do_not_leak(operation, function, dtype):
    """Another first document changes nothing in the second: not a bit of its output or gradients.

    But for the form of the state-space dual in matrix products, whose sums of exponents run over all documents of a
    chunk.
    """
    layout, inputs = {
        "scan": case(scan_inputs, "ttitt|itti"),
        "ssd": case(ssd_inputs, "ttitt|itti"),
        "conv": case(conv_inputs, "ttitt|itti"),
    }[operation]()
    by_row = [name for name, x in inputs.items() if x.shape[0] == layout.rows]
    for backend in OPERATIONS[operation].values():
        if getattr(backend, "missing", lambda: None)() is not None:
            continue
        seen = []
        for scale in (1.0, 3.0):
            leaves = {name: torch.cat((x[:5] * scale, x[5:])) if name in by_row else x for name, x in inputs.items()}
            leaves = {name: x.to(dtype).requires_grad_() for name, x in leaves.items()}
            y, _ = getattr(backend, function)(*leaves.values(), layout)
            grads = torch.autograd.grad(y[5:].pow(2).sum(), list(leaves.values()))
            grads = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
            products = operation == "ssd" and (backend is chunked or (backend is cpu and dtype == torch.float64))
            rounding = TOLERANCES[dtype] if products else 0.0
            for name in by_row:
                before, after = grads[f"d{name}"].abs().split((5, 4))
                assert before.max() <= rounding * after.max(), (backend, name)
            seen.append({"y": y[5:]} | {f"d{name}": grads[f"d{name}"][5:] for name in by_row})
        assert_near(seen[0], seen[1], rounding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("operation", "function"), CASES)
def test_the_order_of_rows_does_not_matter(operation, function, dtype):
    context = stream("tti|tt..", "..iitt|t", "iiiiiiii")
    grouping = Grouping.of(context.modalities, None)
    in_time, by_modality = Layout.of(context), Layout.of(context, grouping)
    make, sizes = {"scan": (scan_inputs, {}), "ssd": (ssd_inputs, {}), "conv": (conv_inputs, {"width": 20})}[operation]
    inputs = make(in_time, False, **sizes)
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    other = {
        name: grouping.split(x.view(3, 8, *x.shape[1:]), context) if x.shape[0] == 24 else x
        for name, x in inputs.items()
    }
    if "bias" in other and operation != "conv":
        other["bias"] = other["bias"].repeat(2, 1)
    for backend in OPERATIONS[operation].values():
        if getattr(backend, "missing", lambda: None)() is None:
            expected, _ = getattr(backend, function)(*inputs.values(), in_time)
            y, _ = getattr(backend, function)(*other.values(), by_modality)
            torch.testing.assert_close(grouping.merge(y, context), expected.view(3, 8, *y.shape[1:]), rtol=0, atol=1e-6)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@needs_compiler
def test_compiled_scan_is_as_exact_as_fp32_allows():
    layout = layout_of("t" * 400 + "i" * 112)
    inputs = scan_inputs(layout, False, width=64, states=16)
    inputs |= {"A": -torch.arange(1.0, 17.0, dtype=torch.float64).repeat(64, 1), "bias": torch.full((1, 64), -4.6)}
    inputs = {name: x.float().double() for name, x in inputs.items()}
    ours = run(cpu, "selective_scan", layout, inputs, torch.float32)
    exact = run(reference, "selective_scan", layout, inputs, torch.float64)
    errors = {name: relative(value, exact[name]) for name, value in ours.items()}
    assert errors.pop("y") < 1.5e-7 and max(errors.values()) < 1e-6, errors


UNEVEN = [
    (function, backend)
    for operation, function in (("scan", "selective_scan"), ("ssd", "ssd"))
    for backend in OPERATIONS[operation]
    if backend not in ("reference", "mamba_ssm")
]


@pytest.mark.parametrize(("function", "backend"), UNEVEN)
def test_very_uneven_steps_lose_nothing(function, backend):
    """Steps of 1e-6 to 1e3, in any order: what a token says to the next is as exact as where all steps are alike."""
    if backend == "cpu" and cpu.missing():
        pytest.skip(f"no compiled kernels: {cpu.missing()}")
    torch.manual_seed(0)
    make, operation = {"selective_scan": (scan_inputs, "scan"), "ssd": (ssd_inputs, "ssd")}[function]
    layout = layout_of("t" * 130 + "|" + "t" * 71)
    inputs = make(layout, False)
    steps = 10 ** (9 * torch.rand_like(inputs["dt"]) - 6)
    inputs["dt"] = torch.where(steps > 20, steps, steps.expm1().log())  # softplus makes the steps of it
    inputs["bias"] = 0 * inputs["bias"]
    inputs = {name: x.float().double() for name, x in inputs.items()}
    ours = run(OPERATIONS[operation][backend], function, layout, inputs, torch.float32)
    exact = run(reference, function, layout, inputs, torch.float64)
    errors = {name: relative(value, exact[name]) for name, value in ours.items()}
    assert max(errors.values()) < 2e-6, errors


@needs_compiler
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 20.0])
def test_step_sizes_are_exact_however_small(scale):
    """softplus and its slope over the whole range of fp32, through a scan of one token: y = Δ u."""
    dt = torch.linspace(-80, 80, 1601) * min(scale, 1.0)
    width, layout = dt.numel(), layout_of("t")
    one = torch.ones(1, width)
    dt = dt.view(1, -1).requires_grad_()
    y, h = cpu.selective_scan(
        one, dt, 0 * one, -one.T, torch.ones(1, 1), torch.ones(1, 1), torch.zeros(width), 40 * one, layout
    )  # SiLU(40) = 40
    expected = F.softplus(dt.detach().double(), threshold=1000)
    torch.testing.assert_close(h[0, :, 0].double(), expected[0], rtol=4e-7, atol=0)
    (slope,) = torch.autograd.grad(y.sum() / 40, dt)
    torch.testing.assert_close(slope.double(), torch.sigmoid(dt.detach().double()), rtol=1e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(("operation", "function"), CASES)
def test_what_is_not_finite_is_seen(operation, function, bad):
    layout, inputs = CASES[operation, function]["one document"]()
    for name in inputs:
        values = {key: x.float() for key, x in inputs.items()}
        values[name].view(-1)[0] = -bad if name == "A" else bad
        ours, theirs = (getattr(module, function)(*values.values(), layout)[0] for module in (cpu, reference))
        assert ours.isfinite().all() == theirs.isfinite().all(), name


@needs_compiler
@pytest.mark.parametrize(("operation", "function"), CASES)
def test_the_number_of_threads_changes_no_bit(operation, function):
    make, sizes = {
        "scan": (scan_inputs, {"width": 300}),
        "ssd": (ssd_inputs, {"heads": 12}),
        "conv": (conv_inputs, {"width": 300}),
    }[operation]
    layout, inputs = case(make, "ttiit|ti" * 5, "ttiiti" * 5, grouped=True, **sizes)()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(cpu, function, layout, inputs, torch.float32))
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


def test_a_slice_of_a_wider_tensor_needs_no_copy():
    layout = layout_of("ttiit")
    wide = torch.randn(5, 40)
    left, right = wide.chunk(2, dim=-1)
    assert cpu._row_major(left).data_ptr() == wide.data_ptr() and cpu._row_major(right).stride() == (40, 1)
    weight, bias = torch.randn(20, 4), torch.randn(20)
    y, _ = cpu.causal_conv1d(right, weight, bias, layout)
    torch.testing.assert_close(y, reference.causal_conv1d(right, weight, bias, layout)[0], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------- choice and compiling


def test_auto_on_a_cpu_is_compiled_or_says_why_not(monkeypatch):
    for operation in ("scan", "ssd", "conv"):
        choice = kernels.choose(operation)
        assert choice.backend == ("cpu" if cpu.missing() is None else "chunked") and choice.reason
        monkeypatch.setattr(cpu, "missing", lambda: "no C compiler; install gcc, or set CC")
        choice = kernels.choose(operation)
        assert choice.backend == "chunked" and "no C compiler" in choice.reason
        with pytest.raises(
            ConfigError, match=f"^kernels.{operation}: 'cpu' does not load here: no C compiler.*choose auto$"
        ):
            kernels.choose(operation, "cpu")
        monkeypatch.undo()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_package_that_is_not_here_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="kernels.scan: 'mamba_ssm' does not load here: it needs a CUDA device"):
        kernels.check({"scan": "mamba_ssm"})
    assert kernels.choose("scan", device="cuda").backend == "chunked"


@pytest.fixture
def fresh_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "early-fusion-zoo"


def test_no_compiler_and_a_broken_one_say_so(fresh_cache, monkeypatch, tmp_path):
    build = compiled.load.__wrapped__  # past the cache of this process
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(compiled.CompileError, match="this compiler is broken"):
        build("conv.c", TAPS=3)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(compiled.CompileError, match="no C compiler; install gcc, or set CC"):
        build("conv.c", TAPS=3)


@needs_compiler
def test_processes_that_start_together_share_one_library(fresh_cache):
    loaded: list = []
    threads = [
        threading.Thread(target=lambda: loaded.append(compiled.load.__wrapped__("conv.c", TAPS=3))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loaded) == 3 and len(list(fresh_cache.iterdir())) == 1  # no half-made file is left


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.load.__wrapped__("conv.c", TAPS=3).conv_forward


# ----------------------------------------------------------------------------------------------- independent references


def package_function(file: str, *names: str) -> list[Callable]:
    """Functions of mamba-ssm's Python files; skips where its source is not here."""
    try:
        return peers.mamba_ssm(file, *names)
    except UserError as error:
        pytest.skip(str(error))


def by_time(values: Tensor, rows: int) -> Tensor:
    """(R, W) → (B, W, T), the package's order."""
    return values.view(rows, -1, values.shape[-1]).transpose(1, 2)


def test_scan_is_that_of_mamba_ssm():
    (theirs,) = package_function("ops/selective_scan_interface.py", "selective_scan_ref")
    context = TokenContext.from_modality(torch.zeros(2, 37, dtype=torch.int64))
    layout = Layout.of(context)
    inputs = {name: x.float().requires_grad_() for name, x in scan_inputs(layout, False, 32, 16).items()}
    u, dt, bias, A, B, C, D, z = inputs.values()
    y, state = theirs(
        *(by_time(x, 2) for x in (u, dt)), A, *(by_time(x, 2) for x in (B, C)), D, by_time(z, 2), bias[0], True, True
    )
    expected = torch.autograd.grad(y.pow(2).sum(), list(inputs.values()))
    for backend in (reference, chunked, *([cpu] if cpu.missing() is None else [])):
        ours, final = backend.selective_scan(*inputs.values(), layout)
        torch.testing.assert_close(by_time(ours, 2), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(final, state, rtol=1e-4, atol=1e-4)
        for name, grad, other in zip(
            inputs, torch.autograd.grad(ours.pow(2).sum(), list(inputs.values())), expected, strict=True
        ):
            assert relative(grad, other.double()) < 1e-5, name


def test_state_space_dual_is_the_minimal_one_of_mamba_ssm():
    _, theirs = package_function("modules/ssd_minimal.py", "segsum", "ssd_minimal_discrete")
    context = TokenContext.from_modality(torch.zeros(2, 64, dtype=torch.int64))
    layout = Layout.of(context)
    inputs = {name: x.requires_grad_() for name, x in ssd_inputs(layout, False, 4, 8, 1, 16).items()}
    x, dt, bias, A, B, C, D = inputs.values()
    delta = F.softplus(dt + bias).view(2, 64, 4)
    wide = [v.view(2, 64, 1, 16).expand(-1, -1, 4, -1) for v in (B, C)]
    y, state = theirs(x.view(2, 64, 4, 8) * delta.unsqueeze(-1), delta * A, *wide, 16)
    y = y + D[:, None] * x.view(2, 64, 4, 8)
    expected = torch.autograd.grad(y.pow(2).sum(), list(inputs.values()))
    for backend in (reference, chunked):
        ours, final = backend.ssd(*inputs.values(), layout)
        torch.testing.assert_close(ours.view_as(y), y, rtol=0, atol=1e-10)
        torch.testing.assert_close(final, state, rtol=0, atol=1e-10)
        for name, grad, other in zip(
            inputs, torch.autograd.grad(ours.pow(2).sum(), list(inputs.values())), expected, strict=True
        ):
            assert relative(grad, other) < 1e-12, name
