"""The life of a training run, whatever is trained: steps, bad steps, signals, reports, checkpoints, resuming."""

from __future__ import annotations

import dataclasses
import errno
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from pretrain import run_folder
from pretrain.checkpoint import CheckpointStore
from pretrain.metrics import Metrics
from pretrain.optim import learning_rate_factor
from pretrain.process_group import rank_and_world, stop_processes
from pretrain.progress import Progress, peak_flops, peak_memory
from pretrain.recipe import RunRecipe
from pretrain.sums import Sums
from pretrain.task import AnyTask, RunState, Step
from pretrain.watch import Watch
from zoo.config import UserError, printable

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
            f"error: {str(where)!r} cannot be written ({error.strerror}); free space and give the same command again, "
            "it goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        stop_processes()


def train(task: AnyTask, config: Mapping[str, Any]) -> None:
    """Begin or resume the run of `task`, and end it; arguments and errors as for `Loop`."""
    with Watch(task.engine.ranks, task.recipe.folder) as watch:
        Loop(task, config, watch).run()


class Loop:
    """One training run of a task: begun, or resumed where its newest checkpoint stands.

    Args:
        task: what is trained, and on what.
        config: the dictionary that DeepSpeed got; it is written beside the recipe.
        watch: says when to stop early.
    Raises:
        UserError: the checkpoints there are cannot be read, or belong to other data.
    """

    def __init__(self, task: AnyTask, config: Mapping[str, Any], watch: Watch) -> None:
        self.task, self.recipe, self.engine = task, task.recipe, task.engine
        self.ranks, self.watch = task.engine.ranks, watch
        folder, train = self.recipe.folder, self.recipe.train
        self.store = CheckpointStore(folder / run_folder.CHECKPOINTS, train.keep_checkpoints, log=self.say)
        self.store.clean(self.engine)
        self.state: RunState = self._restored(task.new_state())
        task.take_up(self.state)
        self.metrics = Metrics(folder, self.state.step or None, self.say) if self.ranks.first else None
        if self.ranks.first:
            self._say_what_is_new()
            run_folder.write_recipe(folder, self.recipe, config)

    def _say_what_is_new(self) -> None:
        """Whatever makes a resumed run go on otherwise than it would have, and what of a schedule cannot be meant."""
        recipe, train, warmup = self.recipe, self.recipe.train, self.recipe.schedule.warmup_steps
        if self.state.step:
            for line in run_folder.changes(recipe.folder, recipe, self.state.step):
                self.say(line)
        if warmup >= train.steps:
            reached = learning_rate_factor(recipe.schedule, train.steps - 1, train.steps)
            self.say(
                f"schedule.warmup_steps: {warmup} is not less than train.steps {train.steps}: the learning rate ends "
                f"at {reached:.0%} of optimizer.lr, before it has begun to fall"
            )

    def _restored(self, new: RunState) -> RunState:
        """The state of the newest checkpoint, with weights and optimizer; `new` where there is none."""
        found = self.store.load_newest(self.engine)
        state = new if found is None else type(new)(**found)
        if state.data != new.data:
            raise UserError(
                f"data: what the recipe names no longer holds the data that {str(self.recipe.folder)!r} was "
                "trained on; restore them, or choose another run_dir"
            )
        return state

    def run(self) -> None:
        """Train to the last step, or until told to stop; leave a checkpoint, the whole weights and the metrics."""
        task, train, state = self.task, self.recipe.train, self.state
        self._say_where()
        progress, saved_at = Progress(train.steps, state.step), state.step or None
        values: dict[str, float] | None = None
        task.training_mode()
        if state.step < train.steps:
            task.begin()
        while state.step < train.steps:
            began, tokens = time.monotonic(), state.tokens
            step = self._prepare()
            if step is None:
                self.say(f"told to stop: leaving after step {state.step}, the same command goes on from there")
                break
            report = self._take(step)
            progress.add(state.tokens - tokens)
            state.seconds += time.monotonic() - began
            if report is not None:
                self._log(report, progress)
            last, values = state.step == train.steps, None
            if last:
                task.finish(state)
            if last or _due(state.step, train.evaluate_every):
                values = self._evaluate()
            if last or _due(state.step, train.checkpoint_every):
                self._save(values, later=train.checkpoint_in_background and not last)
                saved_at = state.step
        self.store.finish(self.engine)
        if saved_at != state.step:
            self._save(values)
        weights = self.engine.full_state_dict()
        self.watch.close()  # before any rank ends
        self.ranks.barrier()
        if self.metrics is not None:
            task.export(weights)
            self.metrics.close()

    def _say_where(self) -> None:
        """Say that a run is resumed, or that it has been finished before."""
        folder, step, steps = self.recipe.folder, self.state.step, self.recipe.train.steps
        if step >= steps:
            self.say(
                f"{folder} is finished: it has taken {step} of {steps} steps, and the trained model lies in "
                f"{self.task.trained_model}; to go on, give a larger train.steps"
            )
        elif step:
            self.say(f"resuming {folder} at step {step} of {steps}")

    def _prepare(self) -> Step[Any, Any] | None:
        """The next step, its counts summed over all ranks; None where any rank was told to stop.

        Raises:
            UserError: on all ranks, where any of them has no batches.
        """
        problem, batches = "", []
        try:
            batches = self.task.batches(self.state)
        except UserError as error:
            problem = str(error)
        counts = self.task.count(batches)
        local = [*counts.numbers(), int(self.watch.told_to_stop), int(self.store.busy), int(bool(problem))]
        *numbers, stop, busy, problems = self.ranks.sum(
            torch.tensor(local, dtype=torch.int64, device=self.engine.device)
        ).tolist()
        if problems:
            raise UserError(next(filter(None, self.ranks.gather(problem))))
        if not busy:
            self.store.finish(self.engine)
        return None if stop else Step(self.state.step, batches, counts.of(numbers))

    def _take(self, step: Step[Any, Any]) -> dict[str, float] | None:
        """Forward, backward, update. Returns what to log; None at a step that is not logged."""
        recipe, engine, state, task = self.recipe, self.engine, self.state, self.task
        logging = _due(step.number + 1, recipe.train.log_every)
        sums = Sums()
        for i, batch in enumerate(step.batches):
            forward = task.forward(batch, step, logging)
            engine.backward(forward.loss * self.ranks.world, last=i == len(step.batches) - 1)
            sums += forward.sums
        factor = learning_rate_factor(recipe.schedule, step.number, recipe.train.steps)
        result = engine.step(factor)
        task.applied(step.number, result.applied)
        state.step += 1
        task.account(state, step.counts)
        self._count_bad(result.applied)
        if not logging:
            return None
        totals = sums.over(self.ranks, engine.device)
        report = {"tokens": state.tokens, "flops": state.flops, **task.report(state, totals, step.counts)}
        return report | {
            "lr": factor * recipe.optimizer.lr,
            "grad_norm": result.grad_norm,
            "bad_steps": state.bad_steps,
            "seconds": state.seconds,
        }

    def _count_bad(self, applied: bool) -> None:
        """Raises UserError where too many steps in a row were skipped."""
        state, limit = self.state, self.recipe.train.max_bad_steps
        state.bad_in_a_row = 0 if applied else state.bad_in_a_row + 1
        state.bad_steps += not applied
        if not applied:
            self.say(
                f"step {state.step}: the loss or gradient is not finite; step skipped ({state.bad_in_a_row} in a row)"
            )
        if state.bad_in_a_row >= limit:
            self.store.finish(self.engine)
            steps = self.ranks.broadcast(self.store.steps() if self.ranks.first else None)
            there = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no checkpoint yet"
            raise UserError(
                f"train.max_bad_steps: {limit} steps in a row had a non-finite loss or gradient, the last one "
                f"{state.step}; {there}: lower optimizer.lr, set train.clip, or look at the data, and give the same "
                "command again"
            )

    def _log(self, report: dict[str, float], progress: Progress) -> None:
        if self.metrics is None:
            return
        report["tokens_per_second"] = progress.rate()
        report["memory"] = peak_memory(self.engine.device)
        peak = peak_flops(self.engine.device, self.ranks.world)
        if peak:
            per_token = self.state.flops / max(self.state.tokens, 1)
            report["mfu"] = per_token * report["tokens_per_second"] / peak
        self.metrics.log(self.state.step, report)
        self.say(self.task.line(self.state.step, report, progress))

    def _evaluate(self) -> dict[str, float] | None:
        began = time.monotonic()
        self.engine.eval()
        values = self.task.evaluate(self.state.step)
        self.task.training_mode()
        if values is None:
            return None
        if self.metrics is not None:
            state = self.state
            where = {"tokens": state.tokens, "flops": state.flops, "seconds": state.seconds}
            self.metrics.log(state.step, values, where)
        shown = {key.removeprefix("eval/"): value for key, value in values.items() if self.task.shown(key)}
        text = "  ".join(f"{key} {value:.3f}" for key, value in shown.items())
        self.say(f"evaluation after step {self.state.step}: {text}  ({time.monotonic() - began:.1f} s)")
        return values

    def _save(self, values: dict[str, float] | None, later: bool = False) -> None:
        """Save a checkpoint, or (`later`) begin one that is written while training goes on."""
        loss = self.task.judge(values) if values else None
        self.store.finish(self.engine)
        save = self.store.begin if later else self.store.save
        save(self.engine, self.state.step, dataclasses.asdict(self.state), loss)

    def say(self, text: str) -> None:
        """Print a line, on rank 0 alone."""
        if self.ranks.first:
            print(printable(text), flush=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
