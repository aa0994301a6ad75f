"""Savings of synthetic curves whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tools.sweep.pretrain import savings
from tools.sweep.pretrain.savings import Curve, Interval, Pair, Redrawn, Share

X = np.geomspace(1e6, 1e9, 13)
positive = st.floats(0.05, 20)


def law(x: np.ndarray, factor: float = 1.0, exponent: float = 0.1, scale: float = 10.0) -> Curve:
    """A power law that is at each loss after `factor` times as much."""
    return Curve(x, scale * (x / factor) ** -exponent)


@settings(max_examples=50, deadline=None)
@given(factor=st.floats(0.02, 0.98), exponent=st.floats(0.02, 0.5), unit=st.floats(1e-3, 1e12))
def test_a_power_law_is_read_exactly(factor: float, exponent: float, unit: float) -> None:
    """An arm that needs `factor` of everything saves just that, in whatever unit the axis is."""
    found = savings.share(law(unit * X, factor, exponent), law(unit * X, exponent=exponent))
    assert found.value == pytest.approx(factor, rel=1e-6) and found.bound == ""
    assert found.eta == pytest.approx(1 / factor, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(factor=st.floats(1.001, 50))
def test_a_worse_arm_is_only_bounded(factor: float) -> None:
    """It ends before it is down to the baseline's loss, and what it would have needed is not made up."""
    found = savings.share(law(X, factor), law(X))
    assert found == Share(pytest.approx(1.0), "above") and found.value <= factor


def test_a_shorter_arm_is_bounded_by_its_own_end() -> None:
    found = savings.share(law(X[:7], 0.9), law(X))
    assert found == Share(pytest.approx(X[6] / X[-1]), "above")


def test_an_arm_that_is_there_at_once_needs_less_than_its_first_evaluation() -> None:
    assert savings.share(Curve(X, law(X).loss / 100), law(X)) == Share(pytest.approx(X[0] / X[-1]), "below")


@settings(max_examples=80, deadline=None)
@given(st.lists(positive, min_size=2, max_size=9), positive)
def test_reach_is_the_first_crossing(losses: list[float], target: float) -> None:
    """Against the definition, on curves that go up and down: it lies in the first interval whose end is low enough."""
    curve = Curve(X[: len(losses)], np.array(losses))
    found = savings.reach(curve, target)
    below = [i for i, loss in enumerate(losses) if loss <= target]
    if not below:
        assert found == Share(curve.x[-1], "above")
    elif below[0] == 0:
        assert found == Share(curve.x[0], "" if losses[0] == target else "below")
    else:
        i = below[0]
        assert curve.x[i - 1] * (1 - 1e-9) <= found.value <= curve.x[i] * (1 + 1e-9) and not found.bound
        assert curve.at(min(max(found.value, curve.x[i - 1]), curve.x[i])) == pytest.approx(target)


@settings(max_examples=40, deadline=None)
@given(st.lists(positive, min_size=2, max_size=8), st.lists(positive, min_size=2, max_size=8))
def test_shares_turn_round(ours: list[float], theirs: list[float]) -> None:
    """Where both end at the same loss, either's share of the other is the inverse."""
    end = min(*ours, *theirs)
    a, b = (Curve(X[: len(each) + 1], np.array([*each, end])) for each in (ours, theirs))
    there, back = savings.share(a, b), savings.share(b, a)
    assume(not there.bound and not back.bound)
    assert there.value * back.value == pytest.approx(1)
    assert savings.share(a, a).value == pytest.approx(1) or savings.share(a, a).bound


def noisy(seed: int, factor: float, spread: float) -> savings.Pair:
    """One seed moves both curves alike, and each a little by itself."""
    draw = np.random.default_rng(seed)
    common = math.exp(spread * draw.normal())
    own = [math.exp(spread / 20 * draw.normal()) for _ in range(2)]
    arm, base = law(X, factor), law(X)
    return Pair(Curve(X, common * own[0] * arm.loss), Curve(X, common * own[1] * base.loss))


def test_pairs_are_resampled_together() -> None:
    """What seeds have in common does not widen the interval; resampled apart it would."""
    pairs = [noisy(seed, 0.5, 0.05) for seed in range(6)]
    found = savings.saving(pairs)
    assert found.seeds == 6 and found.interval is not None
    assert found.interval.low < found.share.value < found.interval.high
    assert 0.5 == pytest.approx(found.share.value, rel=0.05) and found.interval.high / found.interval.low < 1.15
    shifted = [Pair(pairs[i].arm, pairs[(i + 1) % 6].baseline) for i in range(6)]
    apart = savings.saving(shifted).interval
    assert apart is not None and apart.high / apart.low > 1.5


def test_the_interval_covers_what_it_says() -> None:
    """Nearly 95 in 100 intervals of studies of 6 seeds hold the truth; the percentile bootstrap of so few seeds is a
    little narrow."""
    truth, held = 0.5, 0
    for study in range(60):
        found = savings.saving([noisy(1000 * study + seed, truth, 0.05) for seed in range(6)]).interval
        assert found is not None
        held += found.low <= truth <= found.high
    assert 0.75 <= held / 60 <= 0.99


def test_resamples_that_do_not_come_down_have_no_end() -> None:
    pairs = [Pair(law(X, factor), law(X)) for factor in (0.8, 3.0, 0.7)]
    found = savings.saving(pairs)
    assert found.interval is not None and found.interval.low < 0.8 and math.isinf(found.interval.high)


def test_few_seeds() -> None:
    assert savings.saving([Pair(law(X, 0.5), law(X))]).interval is None
    both = savings.saving([Pair(law(X, 0.5), law(X)), Pair(law(X, 0.6), law(X))])
    assert both.interval == Interval(pytest.approx(0.5), pytest.approx(0.6)), "of four resamples the outermost"
    with pytest.raises(ValueError, match="not evaluated equally often"):
        savings.saving([Pair(law(X), law(X)), Pair(law(X[:-1]), law(X))])


def documents(spread: float, seeds: int, own: float) -> list[Pair]:
    """Pairs 0.1 nats apart whose two runs lose the same on each draw of documents but for `own`."""
    generator = np.random.default_rng(7)
    common = spread * generator.normal(size=(savings.DRAWS, 1))
    found = []
    for _ in range(seeds):
        arm, base = Curve(X, law(X).loss - 0.1), law(X)
        apart = own * generator.normal(size=(savings.DRAWS, 1))
        found.append(Pair(arm, base, Redrawn(arm.loss + common + apart, base.loss + common)))
    return found


def test_documents_are_drawn_with_seeds() -> None:
    """What a draw does to both runs alike widens nothing; what it does to one does, and one seed has an interval."""
    alike, apart = (savings.gap(documents(0.05, 3, own)) for own in (0.0, 0.02))
    assert alike.by_document == pytest.approx(0, abs=1e-9) and alike.by_seed == pytest.approx(0, abs=1e-9)
    assert apart.by_document == pytest.approx(1.96 * 0.02 / 3**0.5, rel=0.1)
    assert apart.half == pytest.approx(math.hypot(apart.by_seed, apart.by_document))
    single = savings.saving(documents(0.0, 1, 0.02))
    assert single.interval is not None and single.interval.low < single.share.value < single.interval.high
    assert math.isinf(savings.gap(documents(0.0, 1, 0.02)).half)
    three = savings.saving(documents(0.0, 3, 0.02)).interval
    assert three is not None and three.high / three.low < single.interval.high / single.interval.low


def test_gaps() -> None:
    """0.1 and 0.3 nats apart everywhere: mean and Student's interval by hand; at the end of the shorter curve."""
    base = Curve(X, np.full(13, 2.0))
    found = savings.gap([Pair(Curve(X[:5], np.full(5, 2.1)), base), Pair(Curve(X, np.full(13, 2.3)), base)])
    assert found.x == X[4] and found.difference == pytest.approx(0.2)
    assert found.half == found.by_seed == pytest.approx(12.706 * 0.1, rel=1e-3)
    assert math.isinf(savings.gap([Pair(base, base)]).half)
    with pytest.raises(ValueError, match="is not within the curve"):
        base.at(X[-1] * 1.01)


@settings(max_examples=30, deadline=None)
@given(exponent=st.floats(0.02, 0.6), scale=st.floats(0.1, 1e3))
def test_a_straight_line_is_fitted_exactly(exponent: float, scale: float) -> None:
    found = savings.fit(list(X), list(scale * X**-exponent))
    assert found.exponent == pytest.approx(exponent, rel=1e-6) and found.scale == pytest.approx(scale, rel=1e-5)
    assert found.exponent_half < 1e-6 and found(X[3]) == pytest.approx(scale * X[3] ** -exponent)


@settings(max_examples=20, deadline=None)
@given(exponent=st.floats(0.1, 0.5), floor=st.floats(0.5, 2))
def test_what_no_compute_takes_away(exponent: float, floor: float) -> None:
    loss = floor + 2 * (X / X[0]) ** -exponent
    found = savings.fit(list(X), list(loss), floor=True)
    assert found.floor == pytest.approx(floor, rel=0.02) and found.exponent == pytest.approx(exponent, rel=0.02)
    assert found(X[5]) == pytest.approx(loss[5], rel=1e-4)


def test_intervals_of_a_fit() -> None:
    """About 95 in 100 intervals of noisy ladders hold the true exponent; two points leave nothing to tell it by."""
    draw, held = np.random.default_rng(0), 0
    x = np.geomspace(1e6, 1e9, 6)
    for _ in range(100):
        found = savings.fit(list(x), list(10 * x**-0.1 * np.exp(0.01 * draw.normal(size=6))))
        held += abs(found.exponent - 0.1) <= found.exponent_half
    assert 88 <= held <= 100
    two = savings.fit([1e6, 1e7], [2.0, 1.0])
    assert math.isinf(two.exponent_half) and two.exponent == pytest.approx(math.log10(2))
    with pytest.raises(ValueError, match="2 points do not fix 3 parameters"):
        savings.fit([1e6, 1e7], [2.0, 1.0], floor=True)


def test_optima() -> None:
    """Two sizes whose curves cross at 1e7·√10: the smaller is best before, the larger after, both where both are."""
    small = Curve(np.geomspace(1e6, 1e9, 31), np.geomspace(1e6, 1e9, 31) ** -0.1)
    cross = 10**7.5
    x = np.geomspace(2e6, 5e8, 31)
    large = Curve(x, cross**-0.1 * (x / cross) ** -0.3)
    found = savings.optima({"small": small, "large": large})
    assert {o.size for o in found if o.compute < 0.99 * cross} == {"small"}
    assert {o.size for o in found if o.compute > 1.01 * cross} == {"large"}
    assert found[0].compute == pytest.approx(2e6) and found[-1].compute == pytest.approx(5e8)
    assert all(o.loss == pytest.approx(min(small.at(o.compute), large.at(o.compute))) for o in found)
    assert savings.optima({"small": small}) == []
    assert savings.optima({"small": Curve(x[:3], x[:3]), "large": Curve(x[10:], x[10:])}) == []
