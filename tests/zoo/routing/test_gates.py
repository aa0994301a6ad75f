"""Gates: the gradients by which routers learn."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.helpers import (
    D_FF,
    MOMA,
    assert_derivative,
    build_model,
    layer,
    stream,
    values,
)
from zoo import Trace


def routed_layer(block: str, norm: str, gate: str, activation: str) -> torch.nn.Module:
    router = {"type": "linear", "activation": activation, "initial_scale": 1.0}
    feedforward = MOMA | {"gate": gate, "router": router}
    depth = {"type": "mod", "capacity": "1/2", "router": router} if block == "mod" else None
    return build_model(layer(feedforward=feedforward, depth=depth, norm=norm)).layers[0]


@pytest.mark.parametrize("activation", ["sigmoid", "raw"])
@pytest.mark.parametrize("gate", ["outside", "inside"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("block", ["moma", "mod"])
def test_router_gradients_are_finite_differences_with_the_routes_held(block, norm, gate, activation):
    routed, context = (
        routed_layer(block, norm, gate, activation),
        stream("ttiit|ittii", "tttti|i....", trace=Trace()),
    )
    x = values(context)
    probe = torch.randn(x.shape, dtype=x.dtype)
    loss = (routed(x, context) * probe).sum()
    routers = {name: p for name, p in routed.named_parameters() if "router" in name}
    assert len(routers) == (3 if block == "mod" else 2)
    for name, gradient in zip(routers, torch.autograd.grad(loss, list(routers.values())), strict=True):
        assert gradient.abs().max() > 1e-4, name

        def replayed() -> float:
            again = context.replace(trace=context.trace.replay())
            return float((routed(x, again) * probe).sum())

        assert_derivative(replayed, routers[name], gradient)


@pytest.mark.parametrize(("gate", "learns"), [("inside", False), ("outside", True)])
def test_a_norm_around_the_gate_cancels_it_for_tokens_with_a_single_expert(gate, learns):
    feedforward = {"type": "moma", "experts": {"text": 1, "image": 1}, "d_ff": D_FF, "gate": gate}
    single, context = build_model(layer(feedforward=feedforward, norm="post")).layers[0], stream("ttiittii")
    with torch.no_grad():
        single.feedforward.groups["text"].experts.w_out.mul_(100)  # large outputs: the norm's epsilon plays no part
        single.feedforward.groups["image"].experts.w_out.mul_(100)
    loss = (single(values(context), context) * torch.randn(1, 8, 8, dtype=torch.float64)).sum()
    for group in single.feedforward.groups.values():
        (gradient,) = torch.autograd.grad(loss, group.router.weight, retain_graph=True)
        assert (float(gradient.abs().max()) > 1e-2) == learns
        assert learns or float(gradient.abs().max()) < 1e-6
