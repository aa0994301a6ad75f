"""What paired runs show, and how much of it chance may be."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t as student

LEVEL = 0.95
"""Level of the confidence intervals."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How well one run did on each item of a test, such as a question; what runs are compared by is `ratio`."""

    scores: Sequence[float]
    """What each item adds."""
    weights: Sequence[float]
    """What each item is divided by: 1 for a share of items, its number of tokens for a mean over tokens."""

    @property
    def ratio(self) -> float:
        return sum(self.scores) / sum(self.weights)


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm's ratio (see `Scores`) minus another's, in runs that share the seed."""

    mean: float
    seeds: int
    by_seed: float
    """Half the width of Student's interval over seeds; infinite for a single one."""
    by_item: float
    """Half the width of the interval over the items of the test, taken as independent."""

    @property
    def shown(self) -> bool:
        """Whether neither other seeds nor other items are likely to turn its sign."""
        return abs(self.mean) > max(self.by_seed, self.by_item) and self.by_seed > 0


def compare(pairs: Mapping[int, Sequence[tuple[Scores, Scores]]]) -> Difference:
    """The difference of two arms.

    Over items it is a ratio R of sums, of d, the difference of an item's scores (mean over the pairs), and its weight
    w. The interval is that of the mean of R + (d − R w) / mean(w), as ratio estimates are linearised; where all weights
    are 1 these are the differences themselves.

    Args:
        pairs: seed → scores of both, one pair a setting; what one seed gives is one observation.
    Raises:
        ValueError: the two were not tested by the same items.
    """
    seeds = [statistics.mean(ours.ratio - theirs.ratio for ours, theirs in each) for each in pairs.values()]
    columns, weights = [], []
    for ours, theirs in (pair for each in pairs.values() for pair in each):
        weights = list(ours.weights)
        if weights != list(theirs.weights):
            raise ValueError("the two were asked other questions")
        columns.append([a - b for a, b in zip(ours.scores, theirs.scores, strict=True)])
    differences = [statistics.mean(each) for each in zip(*columns, strict=True)]
    ratio, size = sum(differences) / sum(weights), statistics.mean(weights)
    items = [ratio + (d - ratio * w) / size for d, w in zip(differences, weights, strict=True)]
    return Difference(statistics.mean(seeds), len(seeds), _half(seeds), _half(items))


def _half(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    return float(student.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
