"""Pretraining: the entry point and the loop.

    deepspeed --num_accelerators N --module pretrain.train RECIPE.yaml [key.sub=value ...]
    python -m pretrain.train RECIPE.yaml [key.sub=value ...]

The same command resumes. TERM or USR1 on any rank ends the run after the step in hand, with a checkpoint.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import zoo
from pretrain import metrics, run_folder
from pretrain import recipe as recipes
from pretrain.checkpoint import CheckpointStore
from pretrain.data import Batch, Data, micro_batches, open_data
from pretrain.engine import (
    Engine,
    check_values,
    choose_device,
    leave,
    prepare_environment,
    rank_and_world,
    stop_processes,
)
from pretrain.evaluate import evaluate, validation_loss
from pretrain.optim import AUXILIARY_SCALE, freeze_main, learning_rate_factor
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from pretrain.updates import Updates
from zoo.config import UserError
from zoo.context import Trace
from zoo.flops import TRAINING_FACTOR
from zoo.model import load_weights
from zoo.routers import AuxiliaryRouter

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return launch(lambda: recipes.load(options.recipe, options.overrides))


def launch(load: Callable[[], Recipe], begin: Callable[[Recipe], Initial | None] | None = None) -> int:
    """Train as a recipe says; every rank calls it. Mistakes of the user are printed, not raised.

    Args:
        load: gives the recipe, the same on every rank.
        begin: gives first weights and the position of the data, the same on every rank, or None to start from the
            seed; called once nothing is wrong with the recipe and rank 0 holds the folder. Default: what the folder has.
    Returns:
        The exit code.
    """
    rank, world = rank_and_world()
    recipe = None
    try:
        recipe = load()
        device = choose_device(recipe.train.device)
        config = recipes.launch_config(recipe, world)
        check_routers(recipe)
        run_folder.check_recipe(recipe.folder, recipe)
        data = open_data(recipe.data, recipe.seed, log=print if rank == 0 else _silent)
        prepare_environment(device)
        check_values(config)
        lock = run_folder.claim(recipe.folder) if rank == 0 else None  # last: until here nothing is written
        initial = begin(recipe) if begin else run_folder.load_initial(recipe.folder)
        Run(recipe, data, config, device, initial).train()
        del lock
        return 0
    except UserError as error:
        if rank == 0:
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


def blueprint(recipe: Recipe) -> zoo.Model:
    """The model without weights: says what it costs and what it is made of; an engine's own may be partitioned."""
    with torch.device("meta"):
        return zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)


def check_routers(recipe: Recipe) -> None:
    """Raise `UserError` where auxiliary routers are to be trained or calibrated, and the model has none."""
    train = recipe.train
    wanted = {"train.trainable": train.trainable == "auxiliary", "train.calibrate_rows": train.calibrate_rows > 0}
    for key, asked in wanted.items():
        if asked and not auxiliary_routers(blueprint(recipe)):
            raise UserError(
                f"{key}: the model has no auxiliary routers; either no block of it looks ahead (dense blocks and token "
                "choice are causal as they are), or its blocks say auxiliary: false"
            )


def auxiliary_routers(model: torch.nn.Module) -> dict[str, AuxiliaryRouter]:
    """All of them, by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryRouter)}


class Run:
    """One training run: engine, data position, checkpoints, reports.

    Args:
        initial: first weights and the position at which the data begin; None to start from the seed.
    """

    def __init__(
        self, recipe: Recipe, data: Data, config: dict[str, Any], device: str, initial: Initial | None
    ) -> None:
        self.recipe, self.data = recipe, data
        self.frozen = recipe.train.trainable == "auxiliary"
        if self.frozen and initial is None:
            raise UserError(
                "train.trainable: auxiliary; there is no trained model to freeze, a run from its seed has random weights: "
                "start from a trained run with python -m tools.train_routers RUN"
            )

        def build() -> zoo.Model:
            checkpointing = recipe.train.activation_checkpointing
            model = zoo.build(
                "model", recipe.model, kernels=recipe.kernels, activation_checkpointing=checkpointing, seed=None
            )
            if self.frozen:
                freeze_main(model)
            return model

        self.blueprint = blueprint(recipe)

        def initialise(model: torch.nn.Module, seed: int, gather: Any) -> None:
            zoo.initialise(model, seed, gather)
            if initial is not None:
                load_weights(model, initial[0], gather)

        self.engine = Engine(
            build_model=build,
            initialise_model=initialise,
            config=config,
            optimizer=recipe.optimizer,
            seed=recipe.seed,
            device=device,
        )
        self.updates = Updates(self.engine.module, self.engine.device, self.engine.all_reduce_sum)
        self.first = self.engine.rank == 0
        self.objective = zoo.build(
            "objective", recipe.objective, d_model=recipe.model.d_model, modalities=self.blueprint.modalities
        )
        self.cost = self.blueprint.cost(recipe.data.sequence_length)
        self.told_to_stop = False
        self.store = CheckpointStore(recipe.folder / "checkpoints", recipe.train.keep_checkpoints, log=self.say)
        self.store.clean(self.engine)
        # upcycled runs take up the data where the old run stopped
        first_row = 0 if initial is None or initial[1]["data"] != data.fingerprint else initial[1]["row"]
        fresh = {
            "first_row": first_row,
            "step": 0,
            "tokens": 0,
            "flops": 0.0,
            "seconds": 0.0,
            "bad_steps": 0,
            "bad_in_a_row": 0,
            "data": data.fingerprint,
        }
        self.state: dict[str, Any] = self.store.load_newest(self.engine) or fresh
        if self.state["data"] != data.fingerprint:
            raise UserError(
                f"data.path: {recipe.data.path!r} no longer holds the data that {str(recipe.folder)!r} was trained on; "
                "restore it, or choose another run_dir"
            )
        resumed_at = self.state["step"] or None
        self.metrics = metrics.Metrics(recipe.folder, resumed_at) if self.first else None
        if self.first:
            run_folder.write_recipe(recipe.folder, recipe, config)
        for choice in zoo.kernels.check(recipe.kernels, self.engine.device.type):
            self.say(f"kernels: {choice.operation} runs on {choice.backend}: {choice.reason}")
        if resumed_at:
            self.say(f"resuming {recipe.folder} at step {resumed_at} of {recipe.train.steps}")

    def say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def train(self) -> None:
        """Run to the last step, or until told to stop; leave a checkpoint, the whole weights and the metrics."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note_signal)
        recipe, state = self.recipe, self.state
        progress = metrics.Progress(recipe.train.steps, state["step"])
        saved_at = state["step"] if state["step"] else -1
        values: dict[str, float] | None = None
        self._training_mode()
        if state["step"] < recipe.train.steps:
            # routers learn the odds of being chosen; a threshold is set once they have
            for router in auxiliary_routers(self.engine.module.module).values():
                router.threshold = torch.zeros_like(router.threshold)
        while state["step"] < recipe.train.steps:
            step, began = state["step"], time.monotonic()
            batches = self._batches(step)
            counts, tokens, stop = self._agree(batches)
            if stop:
                self.say(f"told to stop: leaving after step {step}, the same command goes on from there")
                break
            report = self._step(step, batches, counts, tokens)
            progress.add(sum(tokens))
            state["step"] = step = step + 1
            state["seconds"] += time.monotonic() - began
            last = step == recipe.train.steps
            if report is not None or last:
                self._log(step, report, progress)
            values = None
            if last and recipe.train.calibrate_rows:
                self._calibrate()
            if last or _due(step, recipe.train.evaluate_every):
                values = self._evaluate(step)
            if last or _due(step, recipe.train.checkpoint_every):
                self._save(values)
                saved_at = step
        if saved_at != state["step"]:
            self._save(values)
        weights = self.engine.full_state_dict()
        if self.first:
            run_folder.save_model(recipe.folder, weights | self._frozen_weights())
        if self.metrics:
            self.metrics.close()

    def _training_mode(self) -> None:
        self.engine.train()
        if self.frozen:  # the finished model as it will be used: no dropout, no noise, nothing that is fitted moves
            self.engine.module.module.eval()

    def _frozen_weights(self) -> dict[str, torch.Tensor]:
        """Those that did not train, in the precision they came in; an engine in bf16 has rounded its own."""
        initial = run_folder.load_initial(self.recipe.folder) if self.frozen else None
        frozen = {name for name, p in self.engine.module.module.named_parameters() if not p.requires_grad}
        return {} if initial is None else {name: value for name, value in initial[0].items() if name in frozen}

    # ------------------------------------------------------------------------------------------------------ one step

    def _batches(self, step: int) -> list[Batch]:
        train = self.recipe.train
        batches = micro_batches(
            self.data.train, self.state["first_row"] + step * train.global_batch, train.global_batch, train.micro_batch,
            self.engine.rank, self.engine.world, step, self.recipe.seed,
        )  # fmt: skip
        return batches

    def _agree(self, batches: list[Batch]) -> tuple[dict[str, int], list[int], bool]:
        """Over the whole step and all ranks: target tokens and tokens of each modality, and whether anybody was told to
        stop. Losses are normalised by these, so it does not matter which rank or micro-batch holds which token."""
        names = self.blueprint.modalities
        counts = [self.objective.counts(batch.context) for batch in batches]
        local = [sum(c[name] for c in counts) for name in names]
        local += [sum(batch.context.totals[m] for batch in batches) for m in range(len(names))]
        vector = torch.tensor([*local, int(self.told_to_stop)], dtype=torch.int64, device=self.engine.device)
        *totals, stop = self.engine.all_reduce_sum(vector).tolist()
        return dict(zip(names, totals[: len(names)], strict=True)), totals[len(names) :], stop > 0

    def _step(
        self, step: int, batches: list[Batch], counts: dict[str, int], tokens: list[int]
    ) -> dict[str, float] | None:
        """Forward, backward, update. Returns what to log, None where this is no log step."""
        recipe, engine, state = self.recipe, self.engine, self.state
        logging = _due(step + 1, recipe.train.log_every)
        sums: dict[str, torch.Tensor] = {}
        for i, batch in enumerate(batches):
            trace = Trace()
            batch = Batch(batch.tokens, batch.context.replace(trace=trace)).to(engine.device)
            parts = {name: total for name, (total, _) in self.objective(engine.module, batch).items()}
            main = self.objective.combine(parts, counts)
            loss = main
            if trace.penalties:  # their mean over micro-batches and ranks
                balance = torch.stack(list(trace.penalties.values())).sum() / (len(batches) * engine.world)
                loss = main + balance
                parts["balance"] = balance
            if trace.losses:
                auxiliary = sum(total for total, _ in trace.losses.values()) / max(sum(tokens), 1)
                loss = auxiliary if self.frozen else loss + AUXILIARY_SCALE * auxiliary
                parts["auxiliary"] = auxiliary
            self.updates.add(trace.updates)
            engine.backward(loss * engine.world, last=i == len(batches) - 1)
            if logging:
                metrics.add_to(sums, {**parts, "loss": main})
                metrics.add_to(sums, metrics.trace_sums(trace))
        factor = learning_rate_factor(recipe.schedule, step, recipe.train.steps)
        result = engine.step(factor)
        self.updates.apply(step, result.applied)
        state["tokens"] += sum(tokens)
        cost, main = self.cost, 1.0 if self.frozen else TRAINING_FACTOR  # a frozen model runs forward alone
        state["flops"] += sum(
            n * (main * (cost.flops[m] + cost.router[m]) + TRAINING_FACTOR * cost.auxiliary[m])
            for m, n in enumerate(tokens)
        )
        self._count_bad(step, result.applied)
        if not logging:
            return None
        names = sorted(sums)
        reduced = engine.all_reduce_sum(torch.stack([sums[name].detach().double().to(engine.device) for name in names]))
        totals = dict(zip(names, reduced.tolist(), strict=True))
        return self._report(totals, counts, factor * recipe.optimizer.lr, result.grad_norm)

    def _report(
        self, totals: dict[str, float], counts: dict[str, int], lr: float, grad_norm: float
    ) -> dict[str, float]:
        state = self.state
        values = {"tokens": state["tokens"], "flops": state["flops"], **metrics.step_values(totals, counts)}
        return values | {
            "lr": lr, "grad_norm": grad_norm, "bad_steps": state["bad_steps"], "seconds": state["seconds"],
        }  # fmt: skip

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

    # ---------------------------------------------------------------------------------------------------- now and then

    def _log(self, step: int, report: dict[str, float] | None, progress: metrics.Progress) -> None:
        if self.metrics is None or report is None:
            return
        report["tokens_per_second"] = progress.rate()
        peak = metrics.peak_flops(self.engine.device, self.engine.world)
        if peak:
            per_token = self.state["flops"] / max(self.state["tokens"], 1)
            report["mfu"] = per_token * report["tokens_per_second"] / peak
        self.metrics.log(step, report)
        routers = f"  routers {report['auxiliary/accuracy']:.1%} right" if self.frozen else ""
        self.say(progress.line(step, report, self.blueprint.modalities) + routers)

    def _evaluate(self, step: int) -> dict[str, float] | None:
        if self.data.validation is None:
            return None
        began = time.monotonic()
        self.engine.eval()
        values = evaluate(
            self.engine.module, self.blueprint, self.objective, self.data.validation, self.recipe.evaluate.rows,
            self.recipe.train.micro_batch, self.engine.device, self.engine.rank, self.engine.world,
            self.engine.all_reduce_sum,
        )  # fmt: skip
        self._training_mode()
        # the loss of the best constant guess: what any model must beat
        values |= {f"eval/unigram/{name}": nats for name, nats in self.data.unigram_entropy("validation").items()}
        if self.metrics:
            self.metrics.log(step, values)
        shown = "  ".join(
            f"{key.removeprefix('eval/')} {value:.3f}"
            for key, value in values.items()
            if "flops" not in key and (key.count("/") < 3 or "auxiliary" not in key)
        )
        self.say(f"evaluation after step {step}: {shown}  ({time.monotonic() - began:.1f} s)")
        return values

    def _calibrate(self) -> None:
        """Set the thresholds of the auxiliary routers on training rows not seen yet; collective.

        Rank 0 does it on a whole copy of the model, whatever the ZeRO stage.
        """
        recipe, engine = self.recipe, self.engine
        weights, found = engine.full_state_dict(), None
        if self.first:
            model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)
            model.load_state_dict(weights)
            model.to(engine.device, engine.dtype)
            micro = recipe.train.micro_batch
            rows = -(-recipe.train.calibrate_rows // micro) * micro
            first = self.state["first_row"] + recipe.train.steps * recipe.train.global_batch
            batches = micro_batches(self.data.train, first, rows, micro, 0, 1, recipe.train.steps, recipe.seed)
            shares = zoo.calibrate(model, [(b.tokens, b.context) for b in (b.to(engine.device) for b in batches)])
            off = max((abs(wanted - got) for wanted, got in shares.values()), default=0.0)
            self.say(f"calibrated {len(shares)} routers on {rows} rows: causal loads within {off:.2%} of top-k's")
            found = {name: router.threshold.cpu().tolist() for name, router in auxiliary_routers(model).items()}
        found = engine.broadcast_object(found)
        for name, router in auxiliary_routers(engine.module.module).items():
            router.threshold = torch.tensor(found[name])

    def _save(self, values: dict[str, float] | None) -> None:
        loss = validation_loss(values) if values else None
        self.store.save(self.engine, self.state["step"], self.state, loss)

    def _note_signal(self, number: int, frame: object) -> None:
        self.told_to_stop = True


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _silent(text: str) -> None:
    pass


if __name__ == "__main__":
    leave(main())
