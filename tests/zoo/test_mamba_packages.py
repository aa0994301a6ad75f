"""The adapter to mamba-ssm and causal-conv1d, without a GPU: the packages' own Python references stand in for their
kernels, behind the checks that their C++ makes of its arguments (`csrc/selective_scan/selective_scan.cpp` of mamba-ssm
2.3.2, `csrc/causal_conv1d.cpp` of causal-conv1d 1.7.0)."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.zoo.test_mamba_kernels import CASES, TOLERANCES, assert_near, case, conv_inputs, run, scan_inputs
from tools.bench import peers
from zoo import UserError
from zoo.kernels import chunked, mamba_ssm, reference

INPUTS = (torch.float32, torch.float16, torch.bfloat16)


def check(*facts: bool) -> None:
    for number, fact in enumerate(facts):
        if not fact:
            raise RuntimeError(f"argument check {number} of the package")


def in_rows(value: Tensor) -> bool:
    return value.stride(-1) == 1 or value.shape[-1] == 1


def checked_scan(scan: Callable[..., Any]) -> Callable[..., Any]:
    """`selective_scan_fn`, on the CPU."""

    def call(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        delta_bias: Tensor,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        (rows, width, length), states = u.shape, A.shape[1]
        check(
            u.dtype in INPUTS and A.dtype in (torch.float32, torch.complex64),
            all(value.dtype == u.dtype for value in (delta, B, C, z)),
            all(value.dtype == torch.float32 for value in (D, delta_bias)),
            all(map(in_rows, (u, delta, B, C, D, z, delta_bias))),
            states <= 256 and A.shape == (width, states),
            delta.shape == z.shape == u.shape and D.shape == delta_bias.shape == (width,),
            B.shape == C.shape == (rows, B.shape[1], states, length),
        )
        y, state = scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, True)
        return (y, state.detach()) if return_last_state else y

    return call


def checked_convolution(convolution: Callable[..., Any]) -> Callable[..., Any]:
    """`causal_conv1d_fn`, on the CPU."""

    def call(
        x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        rows, width, length = x.shape
        last = x.stride(1) == 1 and x.stride(2) > 1
        check(
            x.dtype in INPUTS and weight.dtype in INPUTS,
            weight.shape[0] == width and 2 <= weight.shape[1] <= 4,
            x.stride(2) == 1 or x.stride(1) == 1,
            not last or (width % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0),
            bias.dtype == weight.dtype and bias.stride(-1) == 1 and bias.shape == (width,),
            rows > 0 and length > 0,  # a launch without threads is an error of CUDA
        )
        if seq_idx is not None:
            check(last, seq_idx.dtype == torch.int32, seq_idx.shape == (rows, length))
        return convolution(x, weight, bias, activation=activation, seq_idx=seq_idx)

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packages are importable; what of them was called."""
    try:
        (scan,) = peers.mamba_ssm("ops/selective_scan_interface.py", "selective_scan_ref")
        (convolution,) = peers.causal_conv1d("causal_conv1d_interface.py", "causal_conv1d_ref")
    except UserError as error:
        pytest.skip(str(error))
    seen: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return function(*args, **kwargs)

        return call

    names = ("causal_conv1d", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    modules: dict[str, Any] = {name: types.ModuleType(name) for name in names}
    modules[names[0]].causal_conv1d_fn = counted("causal_conv1d", checked_convolution(convolution))
    modules[names[-1]].selective_scan_fn = counted("selective_scan", checked_scan(scan))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("function", "name"), [(key[1], name) for key, table in CASES.items() for name in table if key[0] != "ssd"]
)
def test_the_adapter_gives_the_packages_what_they_take(
    calls: list[str], function: str, name: str, dtype: torch.dtype
) -> None:
    """Output, state and gradients are the definition's, in padding, documents, groups, odd and single lengths."""
    layout, inputs = next(table[name] for key, table in CASES.items() if key[1] == function)()
    inputs = {key: x.to(dtype).to(torch.float64) for key, x in inputs.items()}
    through_final = function != "selective_scan" or "state" in inputs  # the scan's final state carries no gradient
    ours = run(mamba_ssm, function, layout, inputs, dtype, through_final=through_final)
    theirs = run(reference, function, layout, inputs, torch.float64, through_final=through_final)
    assert_near(ours, theirs, 2 * TOLERANCES[dtype])
    # what the kernels are not made for
    plain = function == "selective_scan" and "state" in inputs
    plain |= function == "causal_conv1d" and (inputs["weight"].shape[1] > 4 or inputs["weight"].shape[0] % 8 > 0)
    assert calls == ([] if plain else [function])


@pytest.mark.parametrize("function", ["selective_scan", "causal_conv1d"])
def test_the_adapter_past_one_chunk_of_the_kernels(calls: list[str], function: str) -> None:
    """Rows of 2,049 tokens in seven documents."""
    bounds = torch.linspace(0, 2_049, 8).long().tolist()
    row = "|".join("t" * (stop - start) for start, stop in zip(bounds, bounds[1:], strict=False))
    scan = function == "selective_scan"
    layout, inputs = case(scan_inputs, row, width=8, states=4)() if scan else case(conv_inputs, row, width=8)()
    ours = run(mamba_ssm, function, layout, inputs, torch.float32, through_final=False)
    theirs = run(chunked, function, layout, inputs, torch.float64, through_final=False)
    assert_near(ours, theirs, 1e-4)
    assert calls == [function]
