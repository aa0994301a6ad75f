"""How much of a baseline's training another way to train saves, from curves of validation loss; pure functions.

The share s is what an arm needs of tokens, FLOPs or time to come down to the loss that the baseline ends with, over
what the baseline needs for it; η = 1 / s (MoMa, arXiv 2407.21770 §3; Mixture-of-Transformers, arXiv 2411.04996 §3).
Between two evaluations a curve is a straight line in (ln x, ln loss), so that of a power law nothing is lost; past its
ends it is not continued.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy import optimize, stats

LEVEL = 0.95
"""Level of all intervals."""
DRAWS = 1000
"""Resamples of a bootstrap; where seeds are so few that there are fewer resamples, and documents are not drawn with
them, each is taken once."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Validation loss along a run, or the mean of several."""

    x: np.ndarray
    """(n,) tokens, FLOPs or seconds, ascending and above 0."""
    loss: np.ndarray
    """(n,) above 0."""

    def at(self, x: float) -> float:
        """The loss at `x`.

        Raises:
            ValueError: `x` is past an end.
        """
        if not self.x[0] <= x <= self.x[-1]:
            raise ValueError(f"{x:g} is not within the curve, {self.x[0]:g} to {self.x[-1]:g}")
        return math.exp(float(np.interp(math.log(x), np.log(self.x), np.log(self.loss))))


@dataclasses.dataclass(frozen=True)
class Share:
    """A share, or how much more or less than one it is."""

    value: float
    bound: Literal["", "above", "below"] = ""
    """"above": the arm has not come down to the loss, so that it needs more than `value`; "below": it was there at its
    first evaluation, so that it needs less."""

    @property
    def eta(self) -> float:
        """1 / s; the bound turns round."""
        return 1 / self.value


@dataclasses.dataclass(frozen=True)
class Interval:
    """Between these; an end that no resample has reached is infinite."""

    low: float
    high: float


def reach(curve: Curve, loss: float) -> Share:
    """The x at which a curve first comes down to a loss, as a share of 1 x."""
    below = np.flatnonzero(curve.loss <= loss)
    if not below.size:
        return Share(float(curve.x[-1]), "above")
    after = int(below[0])
    if after == 0:
        return Share(float(curve.x[0]), "" if curve.loss[0] == loss else "below")
    (x0, x1), (y0, y1) = np.log(curve.x[after - 1 : after + 1]), np.log(curve.loss[after - 1 : after + 1])
    return Share(math.exp(x0 + (x1 - x0) * (math.log(loss) - y0) / (y1 - y0)))


def share(arm: Curve, baseline: Curve) -> Share:
    """What `arm` needs to come down to the last loss of `baseline`, over what `baseline` first needed for that."""
    target = float(baseline.loss[-1])
    ours, theirs = reach(arm, target), reach(baseline, target)
    bound = ours.bound
    if theirs.bound:  # the baseline was there at its first evaluation
        bound = "above" if ours.bound != "below" else ""
    return Share(ours.value / theirs.value, bound)


def mean(curves: Sequence[Curve]) -> Curve:
    """The mean curve of runs that were evaluated after the same steps.

    Raises:
        ValueError: they were not evaluated equally often.
    """
    if len({len(curve.x) for curve in curves}) > 1:
        raise ValueError("the runs were not evaluated equally often")
    x, loss = (np.mean([getattr(curve, name) for curve in curves], axis=0) for name in ("x", "loss"))
    return Curve(x, loss)


@dataclasses.dataclass(frozen=True)
class Redrawn:
    """Losses of a pair's two curves on other choices of validation documents, the same for both."""

    arm: np.ndarray
    """(DRAWS, n), n points of the arm's curve."""
    baseline: np.ndarray
    """(DRAWS, m), m points of the baseline's."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two runs of one seed."""

    arm: Curve
    baseline: Curve
    redrawn: Redrawn | None = None
    """None where losses of single documents were not kept."""

    def on(self, draw: int) -> Pair:
        """The same on another choice of documents."""
        assert self.redrawn is not None, "documents were kept"
        arm, baseline = self.redrawn.arm[draw], self.redrawn.baseline[draw]
        return Pair(Curve(self.arm.x, arm), Curve(self.baseline.x, baseline))


def over_documents(pairs: Sequence[Pair]) -> bool:
    """Whether intervals can be over the choice of documents, too."""
    return all(pair.redrawn is not None for pair in pairs)


def _value(pairs: Sequence[Pair], statistic: Callable[[Curve, Curve], float]) -> float:
    """The statistic of the mean curves."""
    return statistic(mean([pair.arm for pair in pairs]), mean([pair.baseline for pair in pairs]))


def bootstrap(pairs: Sequence[Pair], statistic: Callable[[Curve, Curve], float], seed: int = 0) -> Interval | None:
    """Percentile interval of a statistic of the two mean curves: pairs are drawn with replacement, and for all of them
    the same validation documents, where losses of single ones were kept. None of a single pair without these.

    Args:
        statistic: of the arm's mean curve and the baseline's; infinite where it is not reached.
        seed: of the draws.
    """
    count = len(pairs)
    if over_documents(pairs):
        draws = np.random.default_rng(seed).integers(0, count, (DRAWS, count)).tolist()
        values = [_value([pairs[i].on(d) for i in draw], statistic) for d, draw in enumerate(draws)]
    elif count < 2:
        return None
    else:
        if count**count <= DRAWS:
            draws = itertools.product(range(count), repeat=count)
        else:
            draws = np.random.default_rng(seed).integers(0, count, (DRAWS, count)).tolist()
        times = collections.Counter(tuple(sorted(draw)) for draw in draws)
        values = [v for draw, n in times.items() for v in [_value([pairs[i] for i in draw], statistic)] * n]
    low, high = (float(np.quantile(values, q, method="nearest")) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(low, high)


@dataclasses.dataclass(frozen=True)
class Saving:
    """What an arm saves of the baseline, over all seeds that both have."""

    share: Share
    """What the mean curves say."""
    interval: Interval | None
    """The share's, see `bootstrap`. Its high end is infinite where resamples do not come down."""
    seeds: int


def saving(pairs: Sequence[Pair]) -> Saving:
    """The share of the mean curves and its interval."""

    def value(arm: Curve, baseline: Curve) -> float:
        found = share(arm, baseline)
        return math.inf if found.bound == "above" else found.value

    whole = share(mean([pair.arm for pair in pairs]), mean([pair.baseline for pair in pairs]))
    return Saving(whole, bootstrap(pairs, value), len(pairs))


@dataclasses.dataclass(frozen=True)
class Gap:
    """An arm's loss minus the baseline's at the largest x that both have reached."""

    x: float
    difference: float
    """Mean over seeds, in the loss's unit."""
    by_seed: float
    """Half the width of Student's interval over seeds; infinite of a single one."""
    by_document: float
    """Half the width of the interval over choices of validation documents, for these seeds; 0 where losses of single
    documents were not kept."""

    @property
    def half(self) -> float:
        """Half the width of the interval over both, which are independent."""
        return math.hypot(self.by_seed, self.by_document)


def gap(pairs: Sequence[Pair]) -> Gap:
    """The difference in loss where the shorter of all curves ends.

    Raises:
        ValueError: a curve begins only past that.
    """
    x = float(min(curve.x[-1] for pair in pairs for curve in (pair.arm, pair.baseline)))

    def difference(pair: Pair) -> float:
        return pair.arm.at(x) - pair.baseline.at(x)

    differences = [difference(pair) for pair in pairs]
    count, by_seed, by_document = len(differences), math.inf, 0.0
    if count > 1:
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, count - 1))
        by_seed = quantile * float(np.std(differences, ddof=1)) / math.sqrt(count)
    if over_documents(pairs):
        redrawn = [np.mean([difference(pair.on(draw)) for pair in pairs]) for draw in range(DRAWS)]
        low, high = np.quantile(redrawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        by_document = float(high - low) / 2
    return Gap(x, float(np.mean(differences)), by_seed, by_document)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """loss = floor + scale · C^−exponent, each with half the width of its interval (infinite where nothing is left
    over to tell it by)."""

    exponent: float
    exponent_half: float
    scale: float
    floor: float
    floor_half: float
    points: int

    def __call__(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.exponent


def fit(compute: Sequence[float], loss: Sequence[float], floor: bool = False) -> PowerLaw:
    """L(C) by least squares of ln loss, over a ladder of sizes.

    Args:
        compute: training FLOPs, above 0.
        loss: at the end of each.
        floor: fit what no compute takes away too; else it is 0, and the fit a straight line in logarithms.
    Raises:
        ValueError: fewer points than parameters.
    """
    count, parameters = len(compute), 3 if floor else 2
    if count < parameters:
        raise ValueError(f"{count} points do not fix {parameters} parameters")
    x, y = np.log(np.asarray(compute, float)), np.log(np.asarray(loss, float))
    freedom = count - parameters
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) if freedom else math.inf
    line = stats.linregress(x, y)
    slope, intercept = float(line.slope), float(line.intercept)
    if not floor:
        half = quantile * float(line.stderr) if freedom else math.inf
        return PowerLaw(-slope, half, math.exp(intercept), 0.0, 0.0, count)
    middle = float(x.mean())

    def model(x: np.ndarray, lowest: float, rise: float, exponent: float) -> np.ndarray:
        return np.logaddexp(lowest, rise - exponent * (x - middle))

    least = float(y.min())
    starts = [(least + math.log(part), least + math.log1p(-part), 0.1 / part) for part in (0.1, 0.5, 0.9)]
    fits: list[Any] = [optimize.curve_fit(model, x, y, start, maxfev=20_000) for start in starts]
    best, covariance = min(fits, key=lambda each: float(((model(x, *each[0]) - y) ** 2).sum()))
    lowest, rise, exponent = map(float, best)
    errors = np.sqrt(np.diag(covariance)) if freedom else np.full(3, math.inf)
    bottom = math.exp(lowest)
    halves = [quantile * float(error) if math.isfinite(error) else math.inf for error in errors]
    return PowerLaw(exponent, halves[2], math.exp(rise + exponent * middle), bottom, bottom * halves[0], count)


@dataclasses.dataclass(frozen=True)
class Optimum:
    """Which size has the lowest loss for a budget."""

    compute: float
    size: str
    loss: float


def optima(curves: Mapping[str, Curve], budgets: int = 16) -> list[Optimum]:
    """The best size for budgets evenly spaced in ln FLOPs, where two sizes at least have been trained so far.

    It is the lower envelope of the curves (arXiv 2203.15556 §3.1). Where the learning rate falls along a run, a loss
    in its middle is higher than that of a run of such a length would be.
    """
    if len(curves) < 2:
        return []
    starts, ends = (sorted(float(curve.x[place]) for curve in curves.values()) for place in (0, -1))
    low, high = starts[1], ends[-2]
    if low > high:
        return []
    found = []
    for compute in np.geomspace(low, high, budgets):
        compute = float(min(max(compute, low), high))
        there = {size: c.at(compute) for size, c in curves.items() if c.x[0] <= compute <= c.x[-1]}
        if len(there) > 1:
            size = min(there, key=there.__getitem__)
            found.append(Optimum(compute, size, there[size]))
    return found
