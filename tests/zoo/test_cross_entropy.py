"""Cross-entropy and log Z by chunks of the vocabulary, against the same of whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import zoo
from tests.zoo.helpers import assert_equal, build_model, gradients, ids, layer, stream
from zoo import cross_entropy
from zoo.batch import Batch
from zoo.cross_entropy import linear_losses, of_logits
from zoo.storages import StorageMeter

TOKENS, WIDTH, IDS = (3, 11), 6, 901
CHUNK = 33 * 128 * 8
"""Bytes of 128 ids of 33 tokens in float64: seven of them and a rest."""


def given(dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(IDS, WIDTH, generator=generator)).to(dtype).requires_grad_()
    target = torch.randint(IDS, TOKENS, generator=generator)
    target[0, :3], target[1, 0], target[2, -1] = -1, 0, IDS - 1
    return x, weight, target


def losses(x: Tensor, weight: Tensor, target: Tensor, chunk_bytes: int) -> dict[str, Tensor]:
    """Losses, log Z, and the gradients of a sum in which every token and both terms have a weight of their own."""
    found = linear_losses(x, weight, target, chunk_bytes=chunk_bytes)
    assert found.log_z is not None
    weights = torch.linspace(-1, 2, target.numel()).view(target.shape)
    total = (weights * found.cross_entropy).sum() + 0.3 * (weights.flip(0) * found.log_z.square()).sum()
    dx, d_weight = torch.autograd.grad(total, [x, weight])
    return {"losses": found.cross_entropy, "log Z": found.log_z, "x": dx, "weight": d_weight}


@pytest.mark.parametrize(
    ("dtype", "chunk_bytes", "tolerance"),
    [
        (torch.float64, CHUNK, 1e-13),
        (torch.float64, 1, 1e-13),  # a chunk has at least 128 ids
        (torch.bfloat16, CHUNK // 2, 1e-2),
    ],
)
def test_chunks_give_what_whole_logits_give(dtype: torch.dtype, chunk_bytes: int, tolerance: float) -> None:
    x, weight, target = given(dtype)
    ours, whole = losses(x, weight, target, chunk_bytes), losses(x, weight, target, 1 << 30)
    assert_equal(ours, whole, tolerance)
    assert all(ours[name].dtype == whole[name].dtype for name in ours)
    assert not ours["losses"][0, :3].any()


def test_logits_that_fit_are_kept_as_they_are() -> None:
    """One chunk is the plain computation, bit for bit."""
    x, weight, target = given(torch.float32)
    ours = losses(x, weight, target, 33 * IDS * 4)
    plain = of_logits(x @ weight.T, target)
    assert torch.equal(ours["losses"], plain.cross_entropy) and torch.equal(ours["log Z"], plain.log_z)


@pytest.mark.parametrize("scale", [0.1, 3.0, 300.0])
def test_fp32_is_as_exact_as_whole_logits_are(scale: float) -> None:
    """By the distance from float64. Logits may be far apart: no chunk loses what it adds."""
    x, weight, target = given(torch.float32, scale)
    exact = losses(*(value.detach().double().requires_grad_() for value in (x, weight)), target, 1 << 30)
    ours, whole = losses(x, weight, target, CHUNK // 2), losses(x, weight, target, 1 << 30)
    for name, value in exact.items():
        off, off_whole = (
            float((found[name] - value).norm().detach() / value.norm().detach()) for found in (ours, whole)
        )
        assert off <= 2 * off_whole + 1e-7, (name, off, off_whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_two_chunks_exist(dtype: torch.dtype) -> None:
    """At a size that is used, counted on the meta device: what forward and backward hold beside their results."""
    rows, width, vocabulary = 16_384, 1024, 65_536
    x, weight = (torch.empty(n, width, dtype=dtype, device="meta").requires_grad_() for n in (rows, vocabulary))
    target = torch.empty(rows, dtype=torch.int64, device="meta")
    results = (rows + vocabulary) * width * dtype.itemsize
    with StorageMeter([x, weight, target]) as meter:
        found = linear_losses(x, weight, target)
        assert found.log_z is not None
        forward = meter.peak
        (found.cross_entropy.sum() + found.log_z.square().sum()).backward()
    assert cross_entropy.CHUNK_BYTES <= forward <= 1.6 * cross_entropy.CHUNK_BYTES, f"{forward:,}"
    assert meter.peak - results < 2 * cross_entropy.CHUNK_BYTES, f"{meter.peak - results:,}"
    with StorageMeter([x, weight, target]) as whole:
        plain = of_logits(x @ weight.T, target)
        assert plain.log_z is not None
        (plain.cross_entropy.sum() + plain.log_z.square().sum()).backward()
    assert whole.peak > 15 * meter.peak


def test_a_models_loss_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part of the objective, and the gradient of every parameter."""
    model, context = build_model(layer()), stream("ttiit|itti", "tti|t", "..it|t|ii", ".")
    objective = zoo.build("objective", {"type": "autoregressive", "z_loss": 0.1, "weights": {"image": 0.3}})
    batch = Batch(ids(context), context)

    def found() -> dict[str, Tensor | None]:
        sums = objective(model, batch)
        return dict(sums) | gradients(objective.combine(sums, objective.counts(batch)), model)

    whole = found()
    monkeypatch.setattr(cross_entropy.linear_losses, "__defaults__", (True, 1))
    monkeypatch.setattr(cross_entropy, "ALIGNED", 8)
    assert_equal(found(), whole, 1e-12)
