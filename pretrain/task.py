"""What is trained, and on what: the questions that `pretrain.loop.Loop` asks a `Task`."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor

from pretrain.engine import Engine
from pretrain.progress import Progress
from pretrain.recipe import RunRecipe
from pretrain.sums import Counts, Sums, Totals

SomeBatch = TypeVar("SomeBatch")
SomeCounts = TypeVar("SomeCounts", bound=Counts)
SomeState = TypeVar("SomeState", bound="RunState")


@dataclasses.dataclass(kw_only=True)
class RunState:
    """Where a run stands: plain values, the same on every rank, saved with each checkpoint.

    A task that keeps more adds fields in a subclass.
    """

    data: str
    """Fingerprint of the data; a run that is resumed must have the same."""
    step: int = 0
    """Steps done, those that were skipped included."""
    tokens: int = 0
    """Over all ranks, without padding."""
    flops: float = 0.0
    """Over all ranks, as the task counts them."""
    seconds: float = 0.0
    """Spent in steps, without evaluations and checkpoints."""
    bad_steps: int = 0
    """Steps that were skipped, because of a non-finite loss or gradient."""
    bad_in_a_row: int = 0


@dataclasses.dataclass(frozen=True)
class Step(Generic[SomeBatch, SomeCounts]):
    """One optimizer step before it is taken."""

    number: int
    """How many steps were done before it."""
    batches: Sequence[SomeBatch]
    """This rank's micro-batches."""
    counts: SomeCounts
    """What the step holds over all micro-batches and ranks."""


@dataclasses.dataclass(frozen=True)
class Forward:
    """One micro-batch's share of a step.

    Attributes:
        loss: a scalar; its sum over micro-batches and ranks is what is minimised.
        sums: for the report.
    """

    loss: Tensor
    sums: Sums


class Task(abc.ABC, Generic[SomeBatch, SomeCounts, SomeState]):
    """A recipe, an engine with the model in it, and the data. The methods stand in the order in which they are called.

    What is collective is called by every rank.
    """

    recipe: RunRecipe
    engine: Engine

    @abc.abstractmethod
    def new_state(self) -> SomeState:
        """The state of a run that begins."""

    def take_up(self, state: SomeState) -> None:  # noqa: B027  a task may have nothing to do here
        """Go on from `state`, a new one or a checkpoint's. Raises UserError where it does not fit this task."""

    def training_mode(self) -> None:
        """Put the model into training mode: at the beginning and after each evaluation."""
        self.engine.train()

    def begin(self) -> None:  # noqa: B027
        """Prepare for the first of the steps that are left; not called where none is."""

    @abc.abstractmethod
    def batches(self, state: SomeState) -> Sequence[SomeBatch]:
        """This rank's micro-batches of the step after `state.step`. Steps are asked for one after the other."""

    @abc.abstractmethod
    def count(self, batches: Sequence[SomeBatch]) -> SomeCounts:
        """What this rank's micro-batches hold."""

    @abc.abstractmethod
    def forward(self, batch: SomeBatch, step: Step[SomeBatch, SomeCounts], reporting: bool) -> Forward:
        """Run one micro-batch of `step`.

        Args:
            reporting: whether sums are wanted; the same on every rank.
        """

    def applied(self, step: int, applied: bool) -> None:  # noqa: B027
        """Take note that the optimizer took the step of that number, or skipped it. Collective."""

    @abc.abstractmethod
    def account(self, state: SomeState, counts: SomeCounts) -> None:
        """Count a step's tokens and FLOPs into the state."""

    @abc.abstractmethod
    def report(self, state: SomeState, totals: Totals, counts: SomeCounts) -> dict[str, float]:
        """What `metrics.jsonl` says of the step just done, beside what it says of every run."""

    def line(self, step: int, report: Mapping[str, float], progress: Progress) -> str:
        """A log step on the screen."""
        return progress.line(step, report, ())

    def finish(self, state: SomeState) -> None:  # noqa: B027
        """Do what follows the last step and precedes the last evaluation. Collective."""

    @abc.abstractmethod
    def evaluate(self, step: int) -> dict[str, float] | None:
        """`eval/…` values of the model, which is in evaluation mode; None without data to evaluate on. Collective.

        Args:
            step: how many steps were done.
        """

    def shown(self, key: str) -> bool:
        """Whether an `eval/…` value is shown on the screen."""
        return True

    @abc.abstractmethod
    def judge(self, values: Mapping[str, float]) -> float:
        """The number by which a checkpoint with these `eval/…` values is judged; the smaller the better."""

    @property
    @abc.abstractmethod
    def trained_model(self) -> Path:
        """Where `export` writes."""

    @abc.abstractmethod
    def export(self, weights: dict[str, Tensor]) -> None:
        """Write the trained model; called on rank 0 alone, with the whole weights in fp32."""


AnyTask = Task[Any, Any, Any]
