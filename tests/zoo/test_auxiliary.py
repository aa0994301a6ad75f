"""Auxiliary routers learn beside the main model without moving it."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.helpers import MOMA, assert_equal, build_model, ids, layer, mod, stream, values
from zoo import Trace
from zoo.routing.statistics import RouterHits


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
    hits, predicted = context.trace.statistics.hits["layers.0"], logits > 0
    assert hits == RouterHits(10, 4, int(predicted.sum()), int((predicted & taken).sum()))
