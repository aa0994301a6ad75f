"""What paired runs show, and how much of it chance may be."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from scipy.stats import t as student

from pretrain.data.questions import Question
from tools.adapt_sweep.rows import Result

LEVEL = 0.95
"""Of confidence intervals."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Accuracy of one arm minus another's, in runs that share the seed."""

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

    def __str__(self) -> str:
        parts = f"{100 * self.mean:+.1f} points, ± {100 * self.by_seed:.1f} over {self.seeds} seeds, ± "
        return parts + f"{100 * self.by_question:.1f} over questions"


def compare(pairs: Mapping[int, Sequence[tuple[Result, Result]]]) -> Difference:
    """The difference of two arms.

    Args:
        pairs: seed → results of both, one pair a target; what one seed gives is one observation.
    """
    seeds = [
        statistics.mean(ours["after"]["accuracy"] - theirs["after"]["accuracy"] for ours, theirs in each)
        for each in pairs.values()
    ]
    flat = [pair for each in pairs.values() for pair in each]
    questions = [
        statistics.mean(marks)
        for marks in zip(
            *(
                [a - b for a, b in zip(ours["after"]["marks"], theirs["after"]["marks"], strict=True)]
                for ours, theirs in flat
            ),
            strict=True,
        )
    ]
    return Difference(statistics.mean(seeds), len(seeds), _half(seeds), _half(questions))


def blind(questions: Sequence[Question]) -> float:
    """Accuracy of always giving the commonest answer to questions that begin with the same two words."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        for asked, answer in question.turns:
            answers[" ".join(asked.split()[:2])][answer] += 1
    return sum(max(found.values()) for found in answers.values()) / sum(map(Counter.total, answers.values()))


def _half(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.inf
    return student.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
