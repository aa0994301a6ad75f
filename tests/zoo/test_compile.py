"""A compiled model is one graph for all batches, and computes what it computes uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.zoo.helpers import DENSE, build_model, ids, layer, mod, untied
from zoo import TokenContext, Trace, noise

DROPOUT = {"dropout": 0.25}
LAYERS: dict[str, dict[str, Any]] = {
    "dense": layer(feedforward=DENSE, **DROPOUT),
    "moma": layer(feedforward=layer()["feedforward"] | {"scope": "microbatch"}, **DROPOUT),
    "mixture of transformers": untied(),
    "mixture of depths": mod(feedforward=DENSE),
}
ROWS, LENGTH, MOST = 2, 16, 3


def batch(number: int) -> TokenContext:
    """Another share of images, other documents and another step in each; those from 3 on are padded."""
    generator = torch.Generator().manual_seed(number)
    modality = (torch.rand(ROWS, LENGTH, generator=generator) < 0.3 + 0.1 * number).long()
    document = (torch.arange(LENGTH) // (3 + number)).repeat(ROWS, 1)
    if number >= 3:
        modality[0, -number:] = document[0, -number:] = -1
    return TokenContext.from_modality(modality, document, step=number, trace=Trace())


def step(model: torch.nn.Module, number: int, compiled: bool) -> list[torch.Tensor]:
    """Logits, auxiliary losses and gradients."""
    context = batch(number)
    if compiled:
        context.count_steps()
    logits = model(ids(context), context)
    assert context.trace is not None
    losses = [total for total, _ in context.trace.losses.values()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logits.square().mean() + sum(losses), parameters, allow_unused=True)
    return [logits, *losses, *(g for g in gradients if g is not None)]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A backend that counts its graphs and runs them as they are."""
    import torch._dynamo
    from torch._dynamo.testing import CompileCounter

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # another test may have started DeepSpeed without it
    torch._dynamo.reset()
    torch.compiler.assume_constant_result(noise.checksum)
    yield CompileCounter()
    torch._dynamo.reset()


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LAYERS if name != "moma"]
"""Half a minute each on a busy core, all of it in the compiler."""


@pytest.mark.parametrize("name", ["moma", *SLOW])
def test_one_graph_for_all_batches(name: str, compiler: Any) -> None:
    plain = build_model(LAYERS[name], kernels={"attention": "sdpa"}).train()
    model = build_model(LAYERS[name], kernels={"attention": "sdpa"}).train()
    compiled: Any = torch.compile(model, backend=compiler, dynamic=True, fullgraph=True)
    for number in (0, 1) if name == "moma" else (0, 1, 4):
        for ours, theirs in zip(step(compiled, number, True), step(plain, number, False), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert compiler.frame_count <= 2, "one for whole rows, one for padded ones"
