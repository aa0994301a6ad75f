"""What a sweep judges by: how results hold it, how reports show it, and which way is better."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.finetune.questions import Question, read_questions
from tools.sweep.adapt.plan import AdaptPoint
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.chance import Scores
from tools.sweep.rows import ArmResults, deviation


@dataclasses.dataclass(frozen=True)
class Form:
    """How a number is written."""

    scale: float
    decimals: int
    unit: str

    def __call__(self, value: float, sign: str = "") -> str:
        """Without its unit."""
        return f"{self.scale * value:{sign}.{self.decimals}f}"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One way to say how well a model answers. What runs are compared by is a ratio of sums over questions."""

    name: str
    key: str
    """Key of the ratio in a judged model's values."""
    scores: str
    """The same, of what each question adds to it,"""
    weights: str | None
    """and of what that is divided by; None: 1 each."""
    number: Callable[[float], float]
    """From the ratio to what tables and pictures show."""
    form: Form
    """How that number is written."""
    difference: Form
    """How a difference of two ratios is written."""
    higher: bool
    """Whether more is better."""
    better: str
    worse: str
    """What a choice of layers does that is shown to be so."""
    explained: str
    """What the number is, as the beginning of a sentence."""
    interval: str
    """What is to be said of the interval over questions."""
    control: Callable[[SweepConfig, Sequence[ArmResults[AdaptPoint]]], str]
    """A sentence with a space after it, or nothing: what is reached without the right picture."""
    told: bool
    """Whether models are told the right answers, which prompts then hold; the dense control also with other
    pictures."""

    def of(self, judged: dict[str, Any]) -> float:
        return judged[self.key]

    def questions(self, judged: dict[str, Any]) -> Scores:
        """Scores and weights of all questions, in order."""
        scores = judged[self.scores]
        return Scores(scores, judged[self.weights] if self.weights else [1] * len(scores))

    def show(self, ratios: Sequence[float], runs: int = 1) -> str:
        """Mean of the numbers, with their standard deviation where they are of several runs; nothing of none."""
        if not ratios:
            return ""
        numbers = [self.number(ratio) for ratio in ratios]
        spread = f" ± {self.form(deviation(numbers))}" if runs > 1 else ""
        return f"{self.form(statistics.mean(numbers))}{spread}{self.form.unit}"

    def verdict(self, difference: float) -> str:
        """What one arm's ratio minus another's says, in words."""
        return self.better if (difference > 0) == self.higher else self.worse


def blind(questions: Sequence[Question]) -> float:
    """Accuracy of always giving the commonest answer to questions that begin with the same two words."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        for asked, answer in question.turns:
            answers[" ".join(asked.split()[:2])][answer] += 1
    return sum(max(found.values()) for found in answers.values()) / sum(map(Counter.total, answers.values()))


def _guessed(config: SweepConfig, rows: Sequence[ArmResults[AdaptPoint]]) -> str:
    if not (Path(config.data) / f"{config.test.split}.jsonl").exists():
        return ""
    share = blind(read_questions(Path(config.data), config.test.split)[: config.test.samples])
    return f"The commonest answer to each form of question is right {share:.1%} of the time. "


def _other_pictures(config: SweepConfig, rows: Sequence[ArmResults[AdaptPoint]]) -> str:
    found = [result["exchanged"] for row in rows for _, result in row.results if "exchanged" in result]
    if not found:
        return ""
    shown = PERPLEXITY.show([PERPLEXITY.of(each) for each in found], len(found))
    return f"Dense control with other pictures (each question is given the next picture): perplexity {shown}. "


ACCURACY = Metric(
    name="accuracy",
    key="accuracy",
    scores="marks",
    weights=None,
    number=lambda share: share,
    form=Form(100, 1, " %"),
    difference=Form(100, 1, "points"),
    higher=True,
    better="answers more questions",
    worse="answers fewer questions",
    explained="Accuracy: share of generated answers that are exactly right",
    interval="",
    control=_guessed,
    told=False,
)
PERPLEXITY = Metric(
    name="perplexity",
    key="loss",
    scores="losses",
    weights="tokens",
    number=math.exp,
    form=Form(1, 2, ""),
    difference=Form(1, 3, "nats a token"),
    higher=False,
    better="loses less",
    worse="loses more",
    explained=(
        "Perplexity (lower is better): exp of the mean loss, in nats a token, of the right answers and what ends them, "
        "each fed on the cache of its prompt"
    ),
    interval=(
        " A loss is a ratio, nats over tokens of all answers; its interval over questions is the ratio estimate's."
    ),
    control=_other_pictures,
    told=True,
)
METRICS = {metric.name: metric for metric in (ACCURACY, PERPLEXITY)}
"""Metrics by the name that `test.metric` gives them."""
