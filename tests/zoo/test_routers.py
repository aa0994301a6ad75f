"""Routers: their gradients, and the auxiliary ones that learn beside the main model without moving it."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.zoo.helpers import (
    D_FF,
    MOMA,
    assert_derivative,
    assert_equal,
    build_model,
    ids,
    layer,
    mod,
    stream,
    values,
)
from zoo import Trace
from zoo.routers import capacity_count, rates


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
            with context.trace.replay():
                return float((routed(x, context) * probe).sum())

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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_auxiliary_losses_leave_every_main_gradient_bit_equal(checkpointing):
    def run(with_loss: bool, auxiliary: bool) -> dict:
        feedforward, depth = (
            MOMA | {"auxiliary": auxiliary},
            {"type": "mod", "auxiliary": auxiliary, "capacity": 0.5},
        )
        model = build_model(layer(feedforward=feedforward), mod(depth=depth), activation_checkpointing=checkpointing)
        context = stream("ttiit|ittii", "tttti|i....", trace=Trace())
        logits = model(ids(context), context)
        loss = logits.square().mean()
        if with_loss:
            loss = loss + sum(total / max(1, count) for total, count in context.trace.losses.values())
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        if with_loss:
            assert all(grads[name].any() for name in grads if "auxiliary" in name)
        return {"logits": logits} | {name: grad for name, grad in grads.items() if "auxiliary" not in name}

    alone = run(with_loss=False, auxiliary=False)
    assert_equal(run(with_loss=False, auxiliary=True), alone)
    assert_equal(run(with_loss=True, auxiliary=True), alone)


def test_the_auxiliary_loss_is_the_cross_entropy_of_the_realised_choice():
    context = stream("ttiitti", "tii....", trace=Trace())
    routed = build_model(mod(depth={"type": "mod", "capacity": "1/3"})).layers[0]
    x = values(context)
    y = routed(x, context)
    taken, valid = (y != x).any(-1)[context.valid], context.valid
    logits = routed.auxiliary(x)[..., 0][valid]
    total, count = context.trace.losses["layers.0"]
    expected = -torch.where(taken, logits.sigmoid(), 1 - logits.sigmoid()).log().sum()
    assert count == 10
    torch.testing.assert_close(total, expected)
    sums = context.trace.statistics["layers.0"]
    said = logits > 0
    assert {k: int(v) for k, v in sums.items()} == {
        "total": 10, "chosen": 4, "said": int(said.sum()), "both": int((said & taken).sum())
    }  # fmt: skip


def test_rates_by_hand():
    # of 20 decisions 5 were chosen; the router said yes to 4, of which 3 rightly: 1 false alarm, 2 missed
    assert rates({"total": 20, "chosen": 5, "said": 4, "both": 3}) == {
        "accuracy": 1 - 3 / 20, "precision": 3 / 4, "recall": 3 / 5, "always_skip": 15 / 20
    }  # fmt: skip
    assert rates({"total": 4, "chosen": 0, "said": 0, "both": 0})["accuracy"] == 1
    assert rates({"total": 0, "chosen": 0, "said": 0, "both": 0}) == {}


@pytest.mark.parametrize(
    ("tokens", "capacity", "kept"),
    [
        (8, "1/4", 2),
        (9, "1/4", 3),
        (25, 0.28, 7),
        (50, 0.14, 7),
        (49, "1/49", 1),
        (3, "1/3", 1),
        (0, 1, 0),
        (1, 0.1, 1),
    ],
)
def test_capacity_rounds_up_in_exact_arithmetic(tokens, capacity, kept):
    assert capacity_count(tokens, Fraction(str(capacity))) == kept
