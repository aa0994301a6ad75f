"""Fine-tuning: questions about images, the loss of their answers, and routers; see `FineTuning`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo.adapt as za
from pretrain.engine import Engine, Gather
from pretrain.finetune.batcher import Batcher, QuestionBatch
from pretrain.finetune.evaluate import EvaluatedModel, evaluate, predict
from pretrain.finetune.prompts import IGNORED
from pretrain.finetune.questions import Question
from pretrain.finetune.recipe import FinetuneRecipe
from pretrain.finetune.routing import routing_sums, routing_values
from pretrain.finetune.samples import Batches, Samples, fingerprint, fingerprint_images, too_many
from pretrain.progress import Progress
from pretrain.sums import Counts, Sums, Totals
from pretrain.task import Forward, RunState, Step, Task
from zoo.adapt.family import parts
from zoo.config import UserError
from zoo.flops import TRAINING_FACTOR

MODEL = "model"
"""Folder of the trained model in that of the run."""


@dataclasses.dataclass(frozen=True)
class QuestionCounts(Counts):
    """What batches of questions hold."""

    answers: int
    """Tokens of the answers, which are the ones predicted."""
    tokens: int
    candidates: int
    """Tokens that a layer may skip."""
    flops: int
    """Forward FLOPs of the decoder."""
    truncated: int
    """Samples whose text was cut off."""
    unusable: int
    """Samples that were left out."""


@dataclasses.dataclass(kw_only=True)
class FineTuningState(RunState):
    """Where a fine-tuning stands."""

    base: str
    """Hash of the base's weights where a part of them is frozen, else empty."""
    truncated: int = 0
    """Samples whose text was cut off, so far."""
    unusable: int = 0
    """Samples that were left out, so far."""
    images: str = ""
    """Fingerprint of the images, which may be repaired."""


class FineTuning(Task[QuestionBatch, QuestionCounts, FineTuningState]):
    """One fine-tuning run.

    Args:
        base: as `model.open_base` gives it.
        training, held_out: questions.
        batchers: those of training and of evaluation.
        config: the dictionary that DeepSpeed gets.
        device: "cpu" or "cuda".
    """

    recipe: FinetuneRecipe

    def __init__(
        self,
        recipe: FinetuneRecipe,
        base: Any,
        training: Sequence[Question],
        held_out: Sequence[Question],
        batchers: Sequence[Batcher],
        config: Mapping[str, Any],
        device: str,
    ) -> None:
        from pretrain.finetune import model as models

        self.recipe, self.base, self.training, self.held_out = recipe, base, training, held_out
        self.batchers, self.layers = batchers, base.layers
        frozen = ""

        def initialise(model: torch.nn.Module, seed: int, gather: Gather) -> None:
            nonlocal frozen
            frozen = models.initialise(model, recipe, base, gather)

        self.engine = Engine(
            build_model=lambda: models.skeleton(recipe, base),
            initialise_model=initialise,
            config=config,
            optimizer=recipe.optimizer,
            seed=recipe.seed,
            device=device,
        )
        self.images = fingerprint_images(training)
        self.unusable: list[str] = []
        self.frozen: str = self.engine.ranks.broadcast(frozen)
        # weights that are frozen get no gradient of their own: their backward pass is half as long
        self.factor = TRAINING_FACTOR if models.decoder_trains(recipe, base) else TRAINING_FACTOR - 1
        self.weight = 0.0
        if base.adapt is not None and base.adapt.auxiliary.type != "none":
            self.weight = base.adapt.auxiliary.weight

    # ------------------------------------------------------------------------------------------------- a run's begin

    def new_state(self) -> FineTuningState:
        return FineTuningState(data=fingerprint(self.training), base=self.frozen, images=self.images)

    def take_up(self, state: FineTuningState) -> None:
        if state.base != self.frozen:
            raise UserError(
                f"base: the weights of {self.base.name!r} are no longer those that {str(self.recipe.folder)!r} was "
                "begun with, and parts of them are frozen; restore them, or choose another run_dir"
            )
        train, ranks = self.recipe.train, self.engine.ranks
        if state.images != self.images and ranks.first:
            print("note: images of data.path have changed since the run began; it goes on with what they are now")
        state.images = self.images
        plan = Batches(
            Samples(self.training, self.recipe.seed),
            self.batchers[0],
            train.global_batch,
            train.micro_batch,
            ranks.rank,
            ranks.world,
            self.recipe.data.workers,
        )
        self.stream: Iterator[list[QuestionBatch]] = plan.since(state.step)
        if self.base.adapt is not None and ranks.first:
            print(_plan(self.base), flush=True)

    # ------------------------------------------------------------------------------------------------------ one step

    def batches(self, state: FineTuningState) -> list[QuestionBatch]:
        batches = next(self.stream)
        for reason in (reason for batch in batches for reason in batch.unusable):
            if reason not in self.unusable:
                self.unusable.append(reason)
                print(f"skipped {reason}", file=sys.stderr, flush=True)
        return batches

    def count(self, batches: Sequence[QuestionBatch]) -> QuestionCounts:
        flops = sum(
            za.decoder_flops(self.base.blueprint, tokens, groups).total
            for batch in batches
            for tokens, groups in zip(batch.tokens, batch.groups, strict=True)
        )
        return QuestionCounts(
            answers=sum(batch.answers for batch in batches),
            tokens=sum(sum(batch.tokens) for batch in batches),
            candidates=sum(batch.candidates for batch in batches),
            flops=round(flops),
            truncated=sum(batch.truncated for batch in batches),
            unusable=sum(len(batch.unusable) for batch in batches),
        )

    def forward(self, batch: QuestionBatch, step: Step[QuestionBatch, QuestionCounts], reporting: bool) -> Forward:
        engine, counts = self.engine, step.counts
        torch.manual_seed(self.recipe.seed * 1_000_003 + batch.first)  # dropout depends on the samples alone
        trace = za.Trace() if self.layers else None
        logits, labels = predict(engine.module, batch.to(engine.device, engine.dtype), trace)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
        loss = main = losses / max(counts.answers, 1)
        seen = None if batch.filler and not batch.candidates else trace
        auxiliary = main.new_zeros(())
        if seen is not None and seen.losses:
            auxiliary = sum((total for total, _ in seen.losses.values()), auxiliary) / max(counts.candidates, 1)
            loss = main + self.weight * auxiliary
        if not reporting:
            return Forward(loss, Sums())
        return Forward(loss, Sums(main, auxiliary=auxiliary, routing=routing_sums(seen, self.layers)))

    def account(self, state: FineTuningState, counts: QuestionCounts) -> None:
        state.tokens += counts.tokens
        state.flops += self.factor * counts.flops
        state.truncated += counts.truncated
        state.unusable += counts.unusable
        epochs = -(-state.step * self.recipe.train.global_batch // len(self.training))  # those begun
        limit = self.recipe.data.max_broken_samples
        if state.unusable > limit * epochs:
            reasons = [reason for each in self.engine.ranks.gather(self.unusable) for reason in each]
            raise too_many(limit, state.unusable, -(-state.unusable // epochs), reasons)

    # -------------------------------------------------------------------------------------------------------- reports

    def report(self, state: FineTuningState, totals: Totals, counts: QuestionCounts) -> dict[str, float]:
        assert totals.loss is not None and totals.auxiliary is not None
        values = {"loss": totals.loss}
        if self.layers:
            values["auxiliary/loss"] = totals.auxiliary / len(self.layers)
            values |= routing_values(totals.routing)
        epoch = state.step * self.recipe.train.global_batch / len(self.training)
        return values | {"epoch": epoch, "truncated": state.truncated, "unusable": state.unusable}

    def line(self, step: int, report: Mapping[str, float], progress: Progress) -> str:
        line = progress.line(step, report, ())
        if "skip" not in report:
            return line
        return f"{line}  {report['skip']:.0%} skipped, routers {report['auxiliary/accuracy']:.1%} right"

    def evaluate(self, step: int) -> dict[str, float]:
        engine, recipe = self.engine, self.recipe
        model = EvaluatedModel(
            engine.module.module,
            engine.module,
            self.base.blueprint,
            engine.device,
            engine.dtype,
            engine.ranks,
            together=engine.stage == 3,
        )
        batch, generate = recipe.evaluate.batch or recipe.train.micro_batch, recipe.evaluate.generate
        return evaluate(model, self.batchers[1], self.held_out, batch, generate).values(generate)

    def shown(self, key: str) -> bool:
        return "decoder_flops" not in key and (key.count("/") == 1 or "accuracy/" in key)

    def judge(self, values: Mapping[str, float]) -> float:
        return values["eval/loss"]

    @property
    def trained_model(self) -> Path:
        return self.recipe.folder / MODEL

    def export(self, weights: dict[str, Tensor]) -> None:
        from pretrain.finetune import model as models

        folder = models.save(self.recipe, self.base, weights, self.trained_model)
        print(f"{folder} is written", flush=True)


def _plan(base: Any) -> str:
    """Which layers are routed, and what to know about it."""
    routed = za.routed_layers(base.blueprint)
    depth = len(parts(base.blueprint).layers)
    kept = ", ".join(f"{layer.routing.layer}: {float(layer.routing.capacity):.2f}" for layer in routed)
    last = routed[-1].routing.layer == depth - 1
    note = "; the last layer is routed too, its router gets next to no gradient from the language loss" if last else ""
    return f"{len(routed)} of {depth} layers are routed and keep of their candidates {kept}{note}"
