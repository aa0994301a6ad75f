"""The small parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.layers import wide_linear


def run(x: Tensor, weight: Tensor, probe: Tensor, wide: bool) -> tuple[Tensor, ...]:
    """Product, gradient of x, gradient of the weight; of fp32 copies where not `wide`."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    y = wide_linear(*leaves) if wide else F.linear(*(leaf.float() for leaf in leaves))
    return y, *torch.autograd.grad(y, leaves, probe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wide_product_is_that_of_fp32_copies(dtype: torch.dtype) -> None:
    x, weight, probe = torch.randn(2, 5, 7).to(dtype), torch.randn(3, 7).to(dtype), torch.randn(2, 5, 3)
    for ours, theirs in zip(run(x, weight, probe, True), run(x, weight, probe, False), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert wide_linear(x.double(), weight.double()).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("outputs", [1, 4, 512])
def test_on_a_gpu_bf16_is_summed_in_fp32(outputs: int) -> None:
    x, weight = torch.randn(300, 1024).bfloat16().cuda(), torch.randn(outputs, 1024).bfloat16().cuda()
    probe = torch.randn(300, outputs).cuda()
    ours, theirs = run(x, weight, probe, True), run(x, weight, probe, False)
    assert ours[0].dtype == torch.float32
    for value, expected, tolerance in zip(ours, theirs, (1e-5, 1e-2, 1e-2), strict=True):
        error = (value.double() - expected.double()).norm() / expected.double().norm()
        assert float(error) < tolerance
