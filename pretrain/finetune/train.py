"""Fine-tuning of multimodal LLMs, made sparse or as they are: the entry point and what is special to it.

    deepspeed --num_accelerators N --module pretrain.finetune RECIPE.yaml [key.sub=value ...]
    python -m pretrain.finetune RECIPE.yaml [key.sub=value ...]

The same command resumes. TERM or USR1 on any rank ends the run after the step in hand, with a checkpoint. The trained
model is left in <run>/model, for `zoo.adapt.load_adapted`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zoo.adapt as za
from pretrain import metrics, run_folder
from pretrain import recipe as recipes
from pretrain.deepspeed_config import check_values
from pretrain.engine import Engine
from pretrain.finetune import answers
from pretrain.finetune import recipe as finetune_recipe
from pretrain.finetune.prompts import IGNORED
from pretrain.finetune.questions import Question
from pretrain.finetune.recipe import AdaptRecipe
from pretrain.finetune.samples import Batcher, Batches, QuestionBatch, Samples, fingerprint, open_questions
from pretrain.loop import Loop, command
from pretrain.process_group import choose_device, prepare_environment, rank_and_world
from zoo.adapt.family import parts
from zoo.config import ConfigError, UserError
from zoo.flops import TRAINING_FACTOR

MODEL = "model"
"""Folder of the trained model in that of the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.finetune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return command(lambda: finetune_recipe.load(options.recipe, options.overrides), work)


def work(recipe: AdaptRecipe) -> None:
    """Tune a model as the recipe says; every rank calls it.

    Raises:
        UserError: a mistake of the user's; until the run has its folder nothing is written.
    """
    rank, world = rank_and_world()
    device = choose_device(recipe.train.device)
    prepare_environment(device)
    from pretrain.finetune.model import open_base, quiet  # brings in libraries that bring in DeepSpeed

    quiet(rank)
    base = open_base(recipe)
    if base.adapt is not None and base.adapt.router.type == "attention":
        raise ConfigError(
            "adapt.router.type: 'attention' ranks tokens by what the end of a sequence attends to, in training the end of "
            "its answer; it is judged without training (zoo.adapt.adapt, tools.adapt_sweep), or choose linear"
        )
    config = recipes.deepspeed_for(recipe, world, base.d_model)
    check_values(config)
    run_folder.check_recipe(recipe.folder, recipe)
    training = open_questions(recipe.data.path, "train")
    held_out = open_questions(recipe.data.path, recipe.evaluate.split)[: recipe.evaluate.samples]
    batchers = [_batcher(base, training, recipe, mode) for mode in (True, False)]
    lock = run_folder.claim(recipe.folder) if rank == 0 else None
    Run(recipe, base, training, held_out, batchers, config, device).train()
    del lock


class Run(Loop):
    """One fine-tuning: questions about images, the loss of their answers, and routers.

    Args:
        base: as `model.open_base` gives it.
        training, held_out: questions.
        batchers: those of training and of evaluation.
        config: the dictionary DeepSpeed gets.
    """

    def __init__(
        self,
        recipe: AdaptRecipe,
        base: Any,
        training: Sequence[Question],
        held_out: Sequence[Question],
        batchers: Sequence[Batcher],
        config: dict[str, Any],
        device: str,
    ) -> None:
        from pretrain.finetune import model as models

        self.base, self.held_out, self.batchers, self.layers = base, held_out, batchers, base.layers
        frozen = ""

        def initialise(model: torch.nn.Module, seed: int, gather: Any) -> None:
            nonlocal frozen
            frozen = models.initialise(model, recipe, base, gather)

        engine = Engine(
            build_model=lambda: models.skeleton(recipe, base),
            initialise_model=initialise,
            config=config,
            optimizer=recipe.optimizer,
            seed=recipe.seed,
            device=device,
        )
        frozen = engine.ranks.broadcast(frozen)
        start = {"truncated": 0, "base": frozen}
        super().__init__(recipe, engine, config, fingerprint(training), start)
        if self.state["base"] != frozen:
            raise UserError(
                f"base: the weights of {base.name!r} are no longer those that {str(recipe.folder)!r} was begun with, and "
                "parts of them are frozen; restore them, or choose another run_dir"
            )
        self.size = len(training)
        plan = Batches(
            Samples(training, recipe.seed),
            batchers[0],
            recipe.train.global_batch,
            recipe.train.micro_batch,
            engine.ranks.rank,
            engine.ranks.world,
            recipe.data.workers,
        )
        self.stream: Iterator[list[QuestionBatch]] = plan.since(self.state["step"])
        # weights that are frozen get no gradient of their own: their backward pass is half as long
        self.factor = TRAINING_FACTOR if models.decoder_trains(recipe, base) else TRAINING_FACTOR - 1
        self.weight = 0.0
        if base.adapt is not None:
            self.weight = base.adapt.auxiliary.weight if base.adapt.auxiliary.type != "none" else 0.0
            self.say(_plan(base))

    def export(self, weights: dict[str, Tensor]) -> None:
        from pretrain.finetune import model as models

        folder = models.save(self.recipe, self.base, weights, self.recipe.folder / MODEL)
        self.say(f"{folder} is written")

    # ------------------------------------------------------------------------------------------------------ one step

    def batches(self, step: int) -> list[QuestionBatch]:
        return next(self.stream)

    def counts(self, batches: Sequence[QuestionBatch]) -> list[int]:
        """Answer tokens, tokens, candidates, forward FLOPs of the decoder, samples cut off."""
        flops = sum(
            za.decoder_flops(self.base.blueprint, tokens, groups).total
            for batch in batches
            for tokens, groups in zip(batch.tokens, batch.groups, strict=True)
        )
        return [
            sum(batch.answers for batch in batches),
            sum(sum(batch.tokens) for batch in batches),
            sum(batch.candidates for batch in batches),
            round(flops),
            sum(batch.truncated for batch in batches),
        ]

    def forward(
        self, batch: QuestionBatch, batches: int, totals: list[int], reporting: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        engine, (predicted, _, candidates, *_) = self.engine, totals
        torch.manual_seed(self.recipe.seed * 1_000_003 + batch.first)  # dropout depends on the samples alone
        trace = za.Trace() if self.layers else None
        logits, labels = answers.predict(engine.module, batch.to(engine.device, engine.dtype), trace)
        loss = main = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ) / max(predicted, 1)
        seen = None if batch.filler and not batch.candidates else trace
        auxiliary = main.new_zeros(())
        if seen is not None and seen.losses:
            auxiliary = sum(total for total, _ in seen.losses.values()) / max(candidates, 1)
            loss = main + self.weight * auxiliary
        if not reporting:
            return loss, {}
        return loss, {"loss": main, "auxiliary": auxiliary, **answers.routing_sums(seen, self.layers)}

    def account(self, totals: list[int]) -> None:
        _, tokens, _, flops, truncated = totals
        self.state["tokens"] += tokens
        self.state["flops"] += self.factor * flops
        self.state["truncated"] += truncated

    # -------------------------------------------------------------------------------------------------------- reports

    def report(self, sums: dict[str, float], totals: list[int]) -> dict[str, float]:
        train = self.recipe.train
        values = {"loss": sums["loss"]}
        if self.layers:
            values["auxiliary/loss"] = sums["auxiliary"] / len(self.layers)
            values |= answers.routing_values(sums, self.layers)
        done = self.state["step"] + 1
        return values | {"epoch": done * train.global_batch / self.size, "truncated": self.state["truncated"]}

    def line(self, step: int, report: dict[str, float], progress: metrics.Progress) -> str:
        line = progress.line(step, report, ())
        if "skip" not in report:
            return line
        return f"{line}  {report['skip']:.0%} skipped, routers {report['auxiliary/accuracy']:.1%} right"

    def shown(self, key: str) -> bool:
        return "decoder_flops" not in key and (key.count("/") == 1 or "accuracy/" in key)

    def judge(self, values: Mapping[str, float]) -> float:
        return values["eval/loss"]

    def evaluate(self) -> dict[str, float]:
        engine, recipe = self.engine, self.recipe
        return answers.evaluate(
            engine.module,
            engine.module.module,
            self.base.blueprint,
            self.batchers[1],
            self.held_out,
            recipe.evaluate.batch or recipe.train.micro_batch,
            recipe.evaluate.generate,
            answers.Ranks(
                engine.ranks.rank, engine.ranks.world, engine.ranks.sum, engine.stage == 3 and engine.ranks.world > 1
            ),
            engine.device,
            engine.dtype,
        )


def _batcher(base: Any, training: Sequence[Question], recipe: AdaptRecipe, mode: bool) -> Batcher:
    filler = next(question for question in training if question.images)
    return Batcher(
        base.processor,
        filler,
        base.config,
        base.pictures,
        base.adapt,
        training=mode,
        maximum_length=recipe.data.maximum_length if mode else None,
    )


def _plan(base: Any) -> str:
    """Which layers are routed, and what to know about it."""
    routed = za.routed_layers(base.blueprint)
    depth = len(parts(base.blueprint).layers)
    kept = ", ".join(f"{layer.routing.layer}: {float(layer.routing.capacity):.2f}" for layer in routed)
    last = routed[-1].routing.layer == depth - 1
    note = "; the last layer is routed too, its router gets next to no gradient from the language loss" if last else ""
    return f"{len(routed)} of {depth} layers are routed and keep of their candidates {kept}{note}"
