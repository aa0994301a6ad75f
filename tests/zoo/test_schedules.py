"""Capacity schedules: values by formula, exact counts, and which layer and step of a model gets which."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from tests.zoo.helpers import DENSE, build_model, ids, layer, stream, values
from zoo import ConfigError, ModelConfig, Trace
from zoo.routing.capacity import capacity_count
from zoo.schedules import DENOMINATOR, OverLayers, WarmDown, cosine, linear, warm_down

P_MOD = {"type": "cosine", "first": 1.0, "last": 0.0, "dense_above": 0.85}
P_MOD_RATIOS = [
    *[1.0] * 8,
    0.844,
    0.806,
    0.764,
    0.720,
    0.674,
    0.625,
    0.576,
    0.525,
    0.475,
    0.424,
    0.375,
    0.326,
    0.280,
    0.236,
    0.194,
    0.156,
    *[0.15] * 8,
]


@pytest.mark.parametrize("layers", [2, 3, 8, 32, 41])
def test_curves_are_the_formulas(layers):
    for i in range(layers):
        assert linear(i, layers) == Fraction(layers - 1 - i, layers - 1)
        exact = 0.5 * math.cos(math.pi * i / (layers - 1)) + 0.5
        assert abs(float(cosine(i, layers)) - exact) <= 0.5 / DENOMINATOR + 1e-12
        assert DENOMINATOR % cosine(i, layers).denominator == 0
    assert cosine(0, layers) == linear(0, layers) == 1 and cosine(layers - 1, layers) == linear(layers - 1, layers) == 0


def test_the_cosine_with_a_floor_is_progressive_ratio_decay():
    schedule = OverLayers.parse(P_MOD)
    ratios = [schedule.capacity(i, 32, Fraction("0.15")) for i in range(32)]
    assert [round(float(ratio), 3) for ratio in ratios] == P_MOD_RATIOS
    assert float(sum(ratios) / 32) == pytest.approx(0.5375, abs=1e-4)
    assert ratios[-1] == Fraction(15, 100) and ratios[:8] == [1] * 8


def test_the_last_layer_gets_the_capacity_unless_another_end_is_named():
    line = OverLayers.parse({"type": "linear"})
    assert [line.capacity(i, 5, Fraction(1, 3)) for i in range(5)] == [Fraction(6 - i, 6) for i in range(5)]
    rising = OverLayers.parse({"type": "linear", "first": "1/4", "last": "3/4"})
    assert [rising.capacity(i, 3, Fraction(1, 4)) for i in range(3)] == [Fraction(i + 1, 4) for i in range(3)]
    assert [rising.capacity(i, 3, Fraction(1, 2)) for i in range(3)] == [Fraction(2, 4), Fraction(2, 4), Fraction(3, 4)]
    assert line.capacity(0, 1, Fraction(1, 3)) == Fraction(1, 3)


def test_warm_down_is_a_straight_line_that_stays_down():
    start, end = Fraction(1), Fraction(1, 4)
    assert warm_down(0, 1000, start, end) == 1
    assert warm_down(500, 1000, start, end) == Fraction(5, 8)
    assert warm_down(999, 1000, start, end) == Fraction(1, 4) + Fraction(3, 4000)
    assert warm_down(1000, 1000, start, end) == warm_down(10**9, 1000, start, end) == end
    assert warm_down(0, 10, Fraction(1, 2), Fraction(3, 4)) == Fraction(3, 4)
    schedule = WarmDown.parse({"type": "warm_down", "steps": 3, "start": 0.9})
    counts = [capacity_count(7, schedule.capacity(step, Fraction("0.3"))) for step in range(5)]
    assert counts == [math.ceil(Fraction(7 * n, 10)) for n in (9, 7, 5, 3, 3)] == [7, 5, 4, 3, 3]


def test_a_model_gives_every_layer_its_number():
    routed = layer(depth={"type": "mod", "capacity": {"text": 1.0, "image": 0.15}, "over_layers": P_MOD})
    config = {"modalities": ["text", "image"], "d_model": 8, "vocab_size": 29}
    config |= {"layers": [routed, layer()], "repeat": 16}
    model = build_model(*config["layers"] * 16)
    for i, block in enumerate(model.layers[::2]):
        expected = P_MOD_RATIOS[2 * i]
        assert [round(float(share), 3) for share in block.capacities] == [1, expected]
        assert hasattr(block, "router") == (expected < 1)
    assert [index for index, _ in ModelConfig.parse(config).pattern()] == [0, 1] * 16
    dense = build_model(layer()).layers[0].cost(12)
    assert model.layers[0].cost(12) == dense


@pytest.mark.parametrize(("step", "kept"), [(0, 16), (50, 10), (99, 5), (100, 4), (10_000, 4)])
@pytest.mark.parametrize("capacity", [0.25, {"text": 0.25, "image": 0.25}])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
def test_the_step_of_the_context_decides_in_training(scope, capacity, step, kept):
    depth = {"type": "mod", "capacity": capacity, "scope": scope}
    depth |= {"over_steps": {"type": "warm_down", "steps": 100}}
    model = build_model(layer(depth=depth, feedforward=DENSE))
    row = "t" * 16 if capacity == 0.25 else "t" * 8 + "i" * 8
    kept = kept if capacity == 0.25 else 2 * math.ceil((0.25 + 0.75 * max(0, 100 - step) / 100) * 8)
    for training, expected in ((True, kept), (False, 4)):
        context = stream(row, step=step, trace=Trace())
        model.train(training)(ids(context), context)
        assert int(context.trace.statistics.loads["layers.0"].taken) == expected
    without = build_model(layer(depth=depth | {"over_steps": None}, feedforward=DENSE))
    assert model.layers[0].cost(16) == without.layers[0].cost(16)


def test_everything_passes_gated_at_the_start_of_a_warm_down():
    depth = {"type": "mod", "capacity": 0.25, "over_steps": {"type": "warm_down", "steps": 100}}
    routed, context = build_model(layer(depth=depth)).layers[0], stream("ttiitt")
    x = values(context)
    expected = x + routed.router(x) * (routed.block(x, context) - x)
    assert float((routed(x, context) - expected).detach().abs().max()) < 1e-13


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"over_layers": {"type": "cosin"}}, "over_layers.type: 'cosin': must be 'linear' or 'cosine'"),
        ({"over_layers": {"type": "linear", "dense_above": 0}}, "over_layers.dense_above: 0: must be above 0"),
        ({"over_layers": {"type": "linear", "first": "much"}}, "over_layers.first: 'much': must be"),
        ({"over_steps": {"type": "warm_down"}}, "over_steps.steps: this key is required"),
        ({"over_steps": {"type": "warm_down", "steps": 5, "start": 1.5}}, "over_steps.start: 1.5: must be above 0"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ConfigError) as error:
        build_model(layer(depth={"type": "mod"} | change))
    assert str(error.value).startswith(f"model.layers[0].depth.{message}")
