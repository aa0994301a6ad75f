"""What paired runs show, and how much of it chance may be."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.stats import t as student

from tools.adapt_sweep.metrics import Metric
from tools.adapt_sweep.rows import Result

LEVEL = 0.95
"""Of confidence intervals."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One arm's ratio (see `Metric`) minus another's, in runs that share the seed."""

    mean: float
    seeds: int
    by_seed: float
    """Half the width of Student's interval over seeds; infinite for a single one."""
    by_question: float
    """Half the width of the interval over test questions, taken as independent."""

    @property
    def shown(self) -> bool:
        """Whether neither other seeds nor other questions are likely to turn its sign."""
        return abs(self.mean) > max(self.by_seed, self.by_question) and self.by_seed > 0


def compare(pairs: Mapping[int, Sequence[tuple[Result, Result]]], metric: Metric) -> Difference:
    """The difference of two arms.

    Over questions it is a ratio R of sums, of d, the difference of a question's scores (mean over the pairs), and its
    weight w. The interval is that of the mean of R + (d − R w) / mean(w), as ratio estimates are linearised; where all
    weights are 1 these are the differences themselves.

    Args:
        pairs: seed → results of both, one pair a target; what one seed gives is one observation.
    """
    seeds = [
        statistics.mean(metric.of(ours["after"]) - metric.of(theirs["after"]) for ours, theirs in each)
        for each in pairs.values()
    ]
    columns, weights = [], []
    for ours, theirs in (pair for each in pairs.values() for pair in each):
        mine, weights = metric.questions(ours["after"])
        his, same = metric.questions(theirs["after"])
        if weights != same:
            raise ValueError("the two were asked other questions")
        columns.append([a - b for a, b in zip(mine, his, strict=True)])
    differences = [statistics.mean(each) for each in zip(*columns, strict=True)]
    ratio, size = sum(differences) / sum(weights), statistics.mean(weights)
    questions = [ratio + (d - ratio * w) / size for d, w in zip(differences, weights, strict=True)]
    return Difference(statistics.mean(seeds), len(seeds), _half(seeds), _half(questions))


def _half(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    return student.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
