"""The life of a training run, whatever is trained: steps, bad steps, signals, reports, checkpoints, resuming."""

from __future__ import annotations

import abc
import errno
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pretrain import metrics, run_folder
from pretrain.checkpoint import CheckpointStore
from pretrain.engine import Engine
from pretrain.optim import learning_rate_factor
from pretrain.process_group import rank_and_world, stop_processes
from pretrain.recipe import RunRecipe
from zoo.config import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

SomeRecipe = TypeVar("SomeRecipe", bound=RunRecipe)


def command(load: Callable[[], SomeRecipe], work: Callable[[SomeRecipe], None]) -> int:
    """Do what a recipe says; every rank calls it. Mistakes of the user are printed, not raised.

    Args:
        load: gives the recipe, the same on every rank.
        work: is called with it.
    Returns:
        The exit code.
    """
    recipe = None
    try:
        recipe = load()
        work(recipe)
        return 0
    except UserError as error:
        if rank_and_world()[0] == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        where = error.filename or (recipe and recipe.folder)
        print(
            f"error: {str(where)!r} cannot be written ({error.strerror}); free space and give the same command again, it "
            "goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return 2
    finally:
        stop_processes()


class Loop(abc.ABC):
    """One training run: engine, state, checkpoints, reports. What is trained, and on what, a subclass says.

    Args:
        recipe: of the run.
        engine: with the model in it.
        config: the dictionary DeepSpeed got.
        data: fingerprint of the data; a run that is resumed must have the same.
        start: what else the state begins with, plain values.
    """

    def __init__(
        self, recipe: RunRecipe, engine: Engine, config: dict[str, Any], data: str, start: Mapping[str, Any]
    ) -> None:
        self.recipe: Any = recipe
        self.engine = engine
        self.first = engine.ranks.first
        self.told_to_stop = False
        self.store = CheckpointStore(recipe.folder / "checkpoints", recipe.train.keep_checkpoints, log=self.say)
        self.store.clean(engine)
        counters = {"step": 0, "tokens": 0, "flops": 0.0, "seconds": 0.0, "bad_steps": 0, "bad_in_a_row": 0}
        fresh = {**start, **counters, "data": data}
        self.state: dict[str, Any] = self.store.load_newest(engine) or fresh
        if self.state["data"] != data:
            raise UserError(
                f"data.path: {self.recipe.data.path!r} no longer holds the data that {str(recipe.folder)!r} was trained on; "
                "restore it, or choose another run_dir"
            )
        self.metrics = metrics.Metrics(recipe.folder, self.state["step"] or None) if self.first else None
        if self.first:
            run_folder.write_recipe(recipe.folder, recipe, config)

    # ------------------------------------------------------------------------------------------- what a subclass says

    @abc.abstractmethod
    def batches(self, step: int) -> list[Any]:
        """This rank's micro-batches of a step; called for consecutive steps, between two of which nothing is skipped."""

    @abc.abstractmethod
    def counts(self, batches: Sequence[Any]) -> list[int]:
        """Whole numbers to be added up over all ranks; `forward`, `account` and `report` get their sums."""

    @abc.abstractmethod
    def forward(self, batch: Any, batches: int, totals: list[int], reporting: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """One micro-batch of `batches`: its share of the step's loss, whose sum over micro-batches and ranks is what is
        minimised, and where `reporting` sums for `report`, of the same names on every rank."""

    @abc.abstractmethod
    def account(self, totals: list[int]) -> None:
        """Count a step's tokens and FLOPs into the state."""

    @abc.abstractmethod
    def report(self, sums: dict[str, float], totals: list[int]) -> dict[str, float]:
        """What a log step says: from `forward`'s sums over all micro-batches and ranks."""

    @abc.abstractmethod
    def evaluate(self) -> dict[str, float] | None:
        """`eval/…` values, the model being in evaluation; None where there is nothing to evaluate on. Collective."""

    @abc.abstractmethod
    def judge(self, values: Mapping[str, float]) -> float:
        """The one number, smaller is better, that a checkpoint with these `eval/…` values is judged by."""

    @abc.abstractmethod
    def export(self, weights: dict[str, Tensor]) -> None:
        """Leave the model behind; called on rank 0, with all of its weights."""

    def training_mode(self) -> None:
        self.engine.train()

    def begin(self) -> None:  # noqa: B027  most have nothing to do here, nor in the next two
        """Called before the first step of a run that has steps left."""

    def applied(self, step: int, applied: bool) -> None:  # noqa: B027
        """Called after each optimizer step, or where it was skipped."""

    def finish(self) -> None:  # noqa: B027
        """Called after the last step, before the last evaluation. Collective."""

    def line(self, step: int, report: dict[str, float], progress: metrics.Progress) -> str:
        """A log step on the screen."""
        return progress.line(step, report, ())

    def shown(self, key: str) -> bool:
        """Whether an `eval/…` value is shown on the screen."""
        return True

    # ------------------------------------------------------------------------------------------------------- the loop

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def train(self) -> None:
        """Run to the last step, or until told to stop; leave a checkpoint, the whole weights and the metrics."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note_signal)
        train, state = self.recipe.train, self.state
        if state["step"]:
            self.say(f"resuming {self.recipe.folder} at step {state['step']} of {train.steps}")
        progress = metrics.Progress(train.steps, state["step"])
        saved_at = state["step"] if state["step"] else -1
        values: dict[str, float] | None = None
        self.training_mode()
        if state["step"] < train.steps:
            self.begin()
        while state["step"] < train.steps:
            step, tokens, began = state["step"], state["tokens"], time.monotonic()
            batches, totals, stop = self._prepare(step)
            if stop:
                self.say(f"told to stop: leaving after step {step}, the same command goes on from there")
                break
            report = self._step(step, batches, totals)
            progress.add(state["tokens"] - tokens)
            state["step"] = step = step + 1
            state["seconds"] += time.monotonic() - began
            last = step == train.steps
            if report is not None:
                self._log(step, report, progress)
            values = None
            if last:
                self.finish()
            if last or _due(step, train.evaluate_every):
                values = self._evaluate(step)
            if last or _due(step, train.checkpoint_every):
                self._save(values)
                saved_at = step
        if saved_at != state["step"]:
            self._save(values)
        weights = self.engine.full_state_dict()
        if self.first:
            self.export(weights)
        if self.metrics:
            self.metrics.close()

    def _prepare(self, step: int) -> tuple[list[Any], list[int], bool]:
        """This rank's batches; then over all ranks: the step's counts, by which losses are normalised, so that it does not
        matter which rank or micro-batch holds which token, and whether anybody was told to stop or cannot go on."""
        problem, batches = "", []
        try:
            batches = self.batches(step)
        except UserError as error:
            problem = str(error)
        local = self.counts(batches)
        vector = torch.tensor(
            [*local, int(self.told_to_stop), bool(problem)], dtype=torch.int64, device=self.engine.device
        )
        *totals, stop, problems = self.engine.ranks.sum(vector).tolist()
        if problems:
            raise UserError(next(filter(None, self.engine.ranks.gather(problem))))
        return batches, totals, stop > 0

    def _step(self, step: int, batches: Sequence[Any], totals: list[int]) -> dict[str, float] | None:
        """Forward, backward, update. Returns what to log, None where this is no log step."""
        recipe, engine, state = self.recipe, self.engine, self.state
        logging = _due(step + 1, recipe.train.log_every)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            loss, parts = self.forward(batch, len(batches), totals, logging)
            engine.backward(loss * engine.ranks.world, last=i == len(batches) - 1)
            metrics.add_to(sums, parts)
        factor = learning_rate_factor(recipe.schedule, step, recipe.train.steps)
        result = engine.step(factor)
        self.applied(step, result.applied)
        self.account(totals)
        self._count_bad(step, result.applied)
        if not logging:
            return None
        names = sorted(sums)
        reduced = engine.ranks.sum(torch.stack([sums[name].detach().double().to(engine.device) for name in names]))
        said = self.report(dict(zip(names, reduced.tolist(), strict=True)), totals)
        return {"tokens": state["tokens"], "flops": state["flops"], **said} | {
            "lr": factor * recipe.optimizer.lr,
            "grad_norm": result.grad_norm,
            "bad_steps": state["bad_steps"],
            "seconds": state["seconds"],
        }

    def _count_bad(self, step: int, applied: bool) -> None:
        state, limit = self.state, self.recipe.train.max_bad_steps
        state["bad_in_a_row"] = 0 if applied else state["bad_in_a_row"] + 1
        state["bad_steps"] += not applied
        if not applied:
            self.say(
                f"step {step + 1}: the loss or gradient is not finite; step skipped ({state['bad_in_a_row']} in a row)"
            )
        if state["bad_in_a_row"] >= limit:
            raise UserError(
                f"train.max_bad_steps: {limit} steps in a row had a non-finite loss or gradient, the last one {step + 1}; "
                "checkpoints are intact: lower optimizer.lr, set train.clip, or look at the data, and resume"
            )

    def _log(self, step: int, report: dict[str, float], progress: metrics.Progress) -> None:
        if self.metrics is None:
            return
        report["tokens_per_second"] = progress.rate()
        peak = metrics.peak_flops(self.engine.device, self.engine.ranks.world)
        if peak:
            per_token = self.state["flops"] / max(self.state["tokens"], 1)
            report["mfu"] = per_token * report["tokens_per_second"] / peak
        self.metrics.log(step, report)
        self.say(self.line(step, report, progress))

    def _evaluate(self, step: int) -> dict[str, float] | None:
        began = time.monotonic()
        self.engine.eval()
        values = self.evaluate()
        self.training_mode()
        if values is None:
            return None
        if self.metrics:
            self.metrics.log(step, values)
        shown = "  ".join(
            f"{key.removeprefix('eval/')} {value:.3f}" for key, value in values.items() if self.shown(key)
        )
        self.say(f"evaluation after step {step}: {shown}  ({time.monotonic() - began:.1f} s)")
        return values

    def _save(self, values: dict[str, float] | None) -> None:
        loss = self.judge(values) if values else None
        self.store.save(self.engine, self.state["step"], self.state, loss)

    def _note_signal(self, number: int, frame: object) -> None:
        self.told_to_stop = True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
