"""Calibrated thresholds: the causal load is that of top-k; nothing else changes."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from tests.zoo.helpers import DENSE, MOMA, build_model, ids, layer, random_rows, stream
from tests.zoo.test_model import effect
from zoo import Trace, UserError
from zoo.auxiliary import AuxiliaryRouter
from zoo.batch import Batch
from zoo.calibrate import calibrate, threshold_for
from zoo.routing.statistics import RoutingStatistics

BLIND = layer(depth={"type": "mod", "capacity": 0.25}, feedforward=DENSE)
IMAGES = layer(depth={"type": "mod", "capacity": {"text": 1.0, "image": 0.3}}, feedforward=DENSE)
BOTH = layer(depth={"type": "mod", "capacity": {"text": 0.6, "image": 0.2}, "scope": "microbatch"}, norm="post")
LAYERS = [layer(feedforward=MOMA), BLIND, IMAGES, BOTH]


def batches(count: int = 3) -> list:
    contexts = [stream(*random_rows(4, 30, seed=seed)) for seed in range(count)]
    return [Batch(ids(context, seed=i), context) for i, context in enumerate(contexts)]


@torch.no_grad()
def load(model, data, routing: str) -> dict[str, float]:
    """Share that every block takes, over all of `data`."""
    statistics = RoutingStatistics()
    for batch in data:
        trace = Trace()
        model(batch.tokens, batch.context.replace(routing=routing, trace=trace))
        statistics += trace.statistics
    return statistics.shares()


def test_the_causal_load_becomes_that_of_top_k():
    model, data = build_model(*LAYERS).eval(), batches()
    wanted, before = load(model, data, "topk"), load(model, data, "causal")
    assert any(abs(before[name] - wanted[name]) > 0.1 for name in wanted)
    report = calibrate(model, data)
    after = load(model, data, "causal")
    groups = {f"layers.0.feedforward.groups.{name}" for name in ("text", "image")}
    for name in {"layers.1", "layers.2", "layers.2.image", "layers.3.text", "layers.3.image"} | groups:
        assert after[name] == pytest.approx(wanted[name], abs=1e-9), name
    for name, shares in report.items():
        assert shares.causal == pytest.approx(shares.training, abs=0.04), name  # experts inside MoD see few tokens
        assert shares.causal == pytest.approx(after[name], abs=1e-9) or "block" in name
    assert len(report) == 2 + 1 + 1 + 2 + 2
    assert calibrate(model, data) == report


@torch.no_grad()
def test_the_main_model_and_its_training_routes_do_not_change():
    model, data = build_model(*LAYERS).train(), batches(1)
    tokens, context, weights = (
        data[0].tokens,
        data[0].context,
        {name: p.clone() for name, p in model.named_parameters()},
    )
    before, causal = model(tokens, context), model(tokens, context.replace(routing="causal"))
    calibrate(model, data, passes=1)
    assert model.training and torch.equal(model(tokens, context), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not torch.equal(model(tokens, context.replace(routing="causal")), causal)
    again = context.replace(routing="causal")
    assert max(effect(model, again, time) for time in (5, 14, 22)) < 1e-12


def test_thresholds_survive_casts_and_are_saved():
    model, data = build_model(*LAYERS).eval(), batches(1)
    calibrate(model, data)
    routers = {name: m for name, m in model.named_modules() if isinstance(m, AuxiliaryRouter)}
    before = {name: router.threshold.clone() for name, router in routers.items()}
    assert all(value.any() and value.dtype == torch.float32 for value in before.values())
    assert before["layers.3.auxiliary"].shape == (2, 1)
    assert before["layers.0.feedforward.groups.image.auxiliary"].shape == (1, 3)
    restored = build_model(*LAYERS, seed=1)
    restored.load_state_dict(model.bfloat16().state_dict())
    for name, module in restored.named_modules():
        if name in before:
            assert torch.equal(routers[name].threshold, before[name])
            assert torch.equal(module.threshold, before[name])


def test_a_threshold_moves_the_decision_and_not_the_order():
    router = next(m for m in build_model(BLIND).modules() if isinstance(m, AuxiliaryRouter))
    x = torch.randn(40, 8, dtype=torch.float64)
    logits = router(x)
    assert torch.equal(logits, router.logits(x))
    router.threshold = torch.tensor([[0.25]])
    assert torch.equal(router(x) > 0, logits > 0.25)


@pytest.mark.parametrize("share", ["0", "1/40", "1/3", "0.5", "39/40", "1"])
def test_the_threshold_is_the_quantile(share):
    logits = torch.randn(40)
    above = int((logits > threshold_for(logits, Fraction(share))).sum())
    assert above == round(40 * Fraction(share))


def test_ties_fall_on_the_nearer_side_together():
    logits = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0])
    for share, above in (("1/5", 1), ("2/5", 1), ("3/5", 4), ("4/5", 4), ("1", 5)):
        assert int((logits > threshold_for(logits, Fraction(share))).sum()) == above
    close = torch.tensor([1.0, 1.0 + 2.0**-23])  # neighbours: there is nothing half way between them
    assert int((close > threshold_for(close, Fraction(1, 2))).sum()) == 1


def test_a_dense_model_has_nothing_to_calibrate():
    with pytest.raises(UserError, match="no auxiliary routers"):
        calibrate(build_model(layer(feedforward=DENSE)), batches(1))
