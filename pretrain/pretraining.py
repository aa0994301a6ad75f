"""Pretraining: packed rows of text and images, an objective, losses by modality; see `Pretraining`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import zoo
from pretrain import compiling, document_losses, run_folder
from pretrain.data import Data, micro_batches, tokens_by_rank
from pretrain.data.ratio import imbalance
from pretrain.describe import blueprint, objective_of
from pretrain.engine import Engine, Gather
from pretrain.evaluate import StepCounts, count_batches, evaluate, validation_loss
from pretrain.optim import AUXILIARY_SCALE, freeze_main
from pretrain.progress import Progress
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from pretrain.sums import Sums, Totals, by_source
from pretrain.task import Forward, RunState, Step, Task
from pretrain.updates import Updates
from zoo.auxiliary import AuxiliaryRouter
from zoo.batch import Batch
from zoo.config import UserError
from zoo.flops import TRAINING_FACTOR
from zoo.freezing import train_alone
from zoo.kept import keep_modalities
from zoo.model import load_weights
from zoo.slots import Mixer
from zoo.trace import Trace


def auxiliary_routers(model: torch.nn.Module) -> dict[str, AuxiliaryRouter]:
    """All of them, by their dotted names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AuxiliaryRouter)}


@dataclasses.dataclass(kw_only=True)
class PretrainingState(RunState):
    """Where a pretraining stands."""

    first_row: int
    """Global row at which the data of the run begin."""
    validation: str | None = None
    """Fingerprint of the validation data."""


class Pretraining(Task[Batch, StepCounts, PretrainingState]):
    """One pretraining run.

    Args:
        config: the dictionary that DeepSpeed gets.
        device: "cpu" or "cuda".
        initial: first weights and the position at which the data begin; None to start from the seed.
    Raises:
        UserError: only routers are to be trained, and there is no trained model.
    """

    recipe: Recipe

    def __init__(
        self, recipe: Recipe, data: Data, config: Mapping[str, Any], device: str, initial: Initial | None
    ) -> None:
        self.recipe, self.data = recipe, data
        self.kernels = compiling.kernels_for(recipe.kernels, device) if recipe.train.compile else recipe.kernels
        trainable = recipe.train.trainable
        self.frozen = trainable == "auxiliary"
        if trainable != "all" and initial is None:
            start = "tools.train_routers RUN" if self.frozen else "tools.upcycle RUN RECIPE"
            raise UserError(
                f"train.trainable: {trainable}; there is no trained model to freeze, a run from its seed has random "
                f"weights: start from a trained run with python -m {start}"
            )
        self.position = None if initial is None else initial.position

        def initialise(model: torch.nn.Module, seed: int, gather: Gather) -> None:
            zoo.initialise(model, seed, gather)
            if initial is not None:
                load_weights(model, initial.weights, gather)

        self.blueprint = blueprint(recipe)
        self.engine = Engine(
            build_model=self._build,
            initialise_model=initialise,
            config=config,
            optimizer=recipe.optimizer,
            seed=recipe.seed,
            device=device,
            compile=recipe.train.compile,
        )
        self.updates = Updates(self.engine.module, self.engine.device, self.engine.ranks.sum)
        self.objective = objective_of(recipe)
        self.cost = self.blueprint.cost(recipe.data.sequence_length)

    def _build(self) -> zoo.Model:
        recipe, checkpointing = self.recipe, self.recipe.train.activation_checkpointing
        model = zoo.build(
            "model", recipe.model, kernels=self.kernels, activation_checkpointing=checkpointing, seed=None
        )
        if self.frozen:
            freeze_main(model)
        elif isinstance(recipe.train.trainable, list):
            train_alone(model, recipe.train.trainable)
        return model

    # ------------------------------------------------------------------------------------------------- a run's begin

    def new_state(self) -> PretrainingState:
        # an upcycled run takes up the data where the old run stopped
        start, fingerprint = self.position, self.data.fingerprint
        goes_on = start is not None and start.data == fingerprint
        row = start.row if start is not None and goes_on else 0
        return PretrainingState(data=fingerprint, first_row=row, validation=self.data.validation_fingerprint)

    def take_up(self, state: PretrainingState) -> None:
        if state.validation not in (None, self.data.validation_fingerprint) and self.engine.ranks.first:
            print(
                f"data.validation: the validation data have changed since step {state.step}; what is evaluated from "
                "here on does not compare with what was before",
                flush=True,
            )
        state.validation = self.data.validation_fingerprint
        notes = [
            f"kernels: {choice.operation} runs on {choice.backend}: {choice.reason}"
            for choice in zoo.kernels.check(self.kernels, self.engine.device.type)
        ]
        if self.engine.ranks.first:
            keep_modalities(self.recipe.folder, self.data.modalities)
            print(*notes, *one_way_mixers(self.recipe), sep="\n", flush=True)

    def training_mode(self) -> None:
        self.engine.train()
        if self.frozen:  # the finished model as it will be used: no dropout, no noise, nothing that is fitted moves
            self.engine.module.module.eval()

    def begin(self) -> None:
        # routers learn the odds of being chosen; a threshold is set once they have
        for router in auxiliary_routers(self.engine.module.module).values():
            router.threshold = torch.zeros_like(router.threshold)

    # ------------------------------------------------------------------------------------------------------ one step

    def batches(self, state: PretrainingState) -> list[Batch]:
        train, first = self.recipe.train, state.first_row + state.step * self.recipe.train.global_batch
        rows = range(first, first + train.global_batch)
        batches = micro_batches(
            self.data.train,
            rows,
            train.micro_batch,
            self.engine.ranks,
            step=state.step,
            seed=self.recipe.seed,
            balanced=self.data.balanced,
        )
        return [self.objective.prepare(batch) for batch in batches]

    def count(self, batches: Sequence[Batch]) -> StepCounts:
        return count_batches(self.objective, self.blueprint.modalities, batches)

    def forward(self, batch: Batch, step: Step[Batch, StepCounts], reporting: bool) -> Forward:
        streams = self.data.train.streams
        trace, counts = Trace(terms={} if reporting and len(streams) > 1 else None), step.counts
        batch = batch.under(trace=trace).to(self.engine.device)
        if self.engine.compiled:
            batch.context.count_steps()
        parts = self.objective(self.engine.module, batch)
        loss = main = self.objective.combine(parts, counts.by_part(self.objective))
        balance = auxiliary = None
        if trace.penalties:  # their mean over micro-batches and ranks
            penalties = torch.stack(list(trace.penalties.values())).sum()
            balance = penalties / (len(step.batches) * self.engine.ranks.world)
            loss = main + balance
        if trace.losses:
            total = sum((total for total, _ in trace.losses.values()), main.new_zeros(()))
            auxiliary = total / max(sum(counts.tokens), 1)
            loss = auxiliary if self.frozen else loss + AUXILIARY_SCALE * auxiliary
        self.updates.add(trace.updates)
        if not reporting:
            return Forward(loss, Sums())
        sources = by_source(trace.terms, batch, len(streams))
        return Forward(loss, Sums(main, parts, auxiliary, balance, trace.statistics, sources))

    def applied(self, step: int, applied: bool) -> None:
        self.updates.apply(step, applied)

    def account(self, state: PretrainingState, counts: StepCounts) -> None:
        state.tokens += sum(counts.tokens)
        cost, main = self.cost, 1.0 if self.frozen else TRAINING_FACTOR  # a frozen model runs forward alone
        state.flops += sum(
            n * (main * (cost.flops[m] + cost.router[m]) + TRAINING_FACTOR * cost.auxiliary[m])
            for m, n in enumerate(counts.tokens)
        )

    # -------------------------------------------------------------------------------------------------------- reports

    def report(self, state: PretrainingState, totals: Totals, counts: StepCounts) -> dict[str, float]:
        losses = self.objective.report(totals.parts, counts.by_part(self.objective), training=True)
        return step_values(totals, losses) | self._mixture_values(state, totals, counts)

    def _mixture_values(self, state: PretrainingState, totals: Totals, counts: StepCounts) -> dict[str, float]:
        """What a log step says of several sources: how often each has been gone through, the mean loss of its
        positions, the step's tokens by modality, and how unlike those of its ranks are."""
        mixture, train = self.data.train, self.recipe.train
        if len(mixture.streams) == 1 and not self.data.balanced:
            return {}
        stop = state.first_row + state.step * train.global_batch
        rows = range(stop - train.global_batch, stop)
        by_rank = tokens_by_rank(mixture, rows, train.micro_batch, self.engine.ranks.world, self.data.balanced)
        shares = zip(self.blueprint.modalities, counts.tokens, strict=True)
        return {
            **{f"data/epochs/{name}": epochs for name, epochs in mixture.epochs(stop).items()},
            **{
                f"data/loss/{name}": loss
                for name, loss in zip(mixture.streams, totals.sources, strict=False)
                if loss is not None
            },
            **{f"data/share/{name}": tokens / max(sum(counts.tokens), 1) for name, tokens in shares},
            "data/imbalance": imbalance(by_rank),
        }

    def line(self, step: int, report: Mapping[str, float], progress: Progress) -> str:
        routers = f"  routers {report['auxiliary/accuracy']:.1%} right" if self.frozen else ""
        return progress.line(step, report, self.blueprint.modalities) + routers

    def evaluate(self, step: int) -> dict[str, float] | None:
        if self.data.validation is None:
            return None
        values = evaluate(
            self.engine.module,
            self.blueprint,
            self.objective,
            self.data.validation,
            self.recipe.evaluate.rows,
            self.recipe.train.micro_batch,
            self.engine.ranks,
            self.engine.device,
            self.recipe.evaluate.bits_per_byte,
            document_losses.path_of(self.recipe.folder, step) if self.recipe.evaluate.documents else None,
        )
        # the loss of the best constant guess: what any model must beat
        values |= {f"eval/unigram/{name}": nats for name, nats in self.data.unigram_entropy("validation").items()}
        errors = self.data.constant_error("validation").items()
        return values | {f"eval/constant/{name}": self.objective.constant_loss(name, mse) for name, mse in errors}

    def shown(self, key: str) -> bool:
        return "flops" not in key and "/router/" not in key and (key.count("/") < 3 or "auxiliary" not in key)

    def judge(self, values: Mapping[str, float]) -> float:
        return validation_loss(values)

    # ------------------------------------------------------------------------------------------------------- the end

    def finish(self, state: PretrainingState) -> None:
        """Set the thresholds of the auxiliary routers on training rows not seen yet."""
        if not self.recipe.train.calibrate_rows:
            return
        weights = self.engine.full_state_dict()
        found = self._calibrated(weights, state.first_row) if self.engine.ranks.first else None
        found = self.engine.ranks.broadcast(found)
        for name, router in auxiliary_routers(self.engine.module.module).items():
            router.threshold = torch.tensor(found[name])

    def _calibrated(self, weights: dict[str, Tensor], first_row: int) -> dict[str, Any]:
        """Thresholds by router, found on a whole copy of the model, whatever the ZeRO stage."""
        recipe, train, device = self.recipe, self.recipe.train, self.engine.device
        model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)
        model.load_state_dict(weights)
        model.to(device, self.engine.dtype)
        rows = -(-train.calibrate_rows // train.micro_batch) * train.micro_batch
        first = first_row + train.steps * train.global_batch
        batches = micro_batches(
            self.data.train, range(first, first + rows), train.micro_batch, step=train.steps, seed=recipe.seed
        )
        shares = zoo.calibrate(model, [self.objective.prepare(batch).to(device) for batch in batches], self.objective)
        off = max((abs(share.training - share.causal) for share in shares.values()), default=0.0)
        print(f"calibrated {len(shares)} routers on {rows} rows: causal loads within {off:.2%} of top-k's", flush=True)
        return {name: router.threshold.cpu().tolist() for name, router in auxiliary_routers(model).items()}

    @property
    def trained_model(self) -> Path:
        return self.recipe.folder / run_folder.WEIGHTS

    def export(self, weights: dict[str, Tensor]) -> None:
        run_folder.save_model(self.recipe.folder, weights | self._frozen_weights())

    def _frozen_weights(self) -> dict[str, Tensor]:
        """Those that did not train, in the precision they came in; an engine in bf16 has rounded its own."""
        frozen = {name for name, p in self.engine.module.module.named_parameters() if not p.requires_grad}
        initial = run_folder.load_initial(self.recipe.folder) if frozen else None
        return {} if initial is None else {name: value for name, value in initial.weights.items() if name in frozen}


def one_way_mixers(recipe: Recipe) -> list[str]:
    """A line for each kind of mixer that stays causal inside items whose positions are to see each other."""
    mixers = {layer.mixer.type_name: layer.mixer.block for layer in recipe.model.layers}
    kinds = sorted(kind for kind, mixer in mixers.items() if issubclass(mixer, Mixer) and not mixer.bidirectional)
    return [
        f"model: the mixer {kind} stays causal inside an item of {', '.join(recipe.bidirectional)}; only attention "
        "lets its positions see those that follow"
        for kind in kinds
        if recipe.bidirectional
    ]


def step_values(totals: Totals, losses: Mapping[str, float]) -> dict[str, float]:
    """What a log step says of losses and routers.

    Args:
        totals: of the step, with a `loss`.
        losses: what the objective says of its parts.
    """
    assert totals.loss is not None
    values = {"loss": totals.loss} | {f"loss/{name}": value for name, value in losses.items()}
    if totals.auxiliary is not None:
        values["auxiliary/loss"] = totals.auxiliary
        values |= {f"auxiliary/{key}": value for key, value in totals.routing.all_hits().rates().items()}
    if totals.balance is not None:
        values["balance/loss"] = totals.balance
    for block, load in totals.routing.expert_loads.items():
        values |= {f"load/{block}/{key}": value for key, value in load.balance().items()}
    return values
