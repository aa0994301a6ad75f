"""Pretraining: the entry point and the loop.

    deepspeed --num_accelerators N --module pretrain.train RECIPE.yaml [key.sub=value ...]
    python -m pretrain.train RECIPE.yaml [key.sub=value ...]

The same command resumes. TERM or USR1 on any rank ends the run after the step in hand, with a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

import zoo
from pretrain import metrics, run_folder
from pretrain import recipe as recipes
from pretrain.data import Batch, Data, micro_batches, open_data
from pretrain.deepspeed_config import check_values
from pretrain.describe import blueprint
from pretrain.engine import Engine
from pretrain.evaluate import evaluate, validation_loss
from pretrain.loop import Loop, command
from pretrain.optim import AUXILIARY_SCALE, freeze_main
from pretrain.process_group import choose_device, leave, prepare_environment, rank_and_world
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from pretrain.updates import Updates
from zoo.auxiliary import AuxiliaryRouter
from zoo.config import UserError
from zoo.context import Trace
from zoo.flops import TRAINING_FACTOR
from zoo.model import load_weights


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

    def work(recipe: Recipe) -> None:
        rank, world = rank_and_world()
        device = choose_device(recipe.train.device)
        config = recipes.launch_config(recipe, world)
        check_routers(recipe)
        run_folder.check_recipe(recipe.folder, recipe)
        data = open_data(recipe.data, recipe.modalities, recipe.seed, log=print if rank == 0 else _silent)
        prepare_environment(device)
        check_values(config)
        lock = run_folder.claim(recipe.folder) if rank == 0 else None  # last: until here nothing is written
        initial = begin(recipe) if begin else run_folder.load_initial(recipe.folder)
        Run(recipe, data, config, device, initial).train()
        del lock

    return command(load, work)


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


class Run(Loop):
    """One pretraining run: packed rows, an objective, losses by modality.

    Args:
        initial: first weights and the position at which the data begin; None to start from the seed.
    """

    def __init__(
        self, recipe: Recipe, data: Data, config: dict[str, Any], device: str, initial: Initial | None
    ) -> None:
        self.data = data
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

        engine = Engine(
            build_model=build,
            initialise_model=initialise,
            config=config,
            optimizer=recipe.optimizer,
            seed=recipe.seed,
            device=device,
        )
        self.updates = Updates(engine.module, engine.device, engine.ranks.sum)
        self.objective = zoo.build(
            "objective", recipe.objective, d_model=recipe.model.d_model, modalities=self.blueprint.modalities
        )
        self.cost = self.blueprint.cost(recipe.data.sequence_length)
        # upcycled runs take up the data where the old run stopped
        first_row = 0 if initial is None or initial[1]["data"] != data.fingerprint else initial[1]["row"]
        super().__init__(recipe, engine, config, data.fingerprint, {"first_row": first_row})
        for choice in zoo.kernels.check(recipe.kernels, engine.device.type):
            self.say(f"kernels: {choice.operation} runs on {choice.backend}: {choice.reason}")

    def training_mode(self) -> None:
        self.engine.train()
        if self.frozen:  # the finished model as it will be used: no dropout, no noise, nothing that is fitted moves
            self.engine.module.module.eval()

    def begin(self) -> None:
        # routers learn the odds of being chosen; a threshold is set once they have
        for router in auxiliary_routers(self.engine.module.module).values():
            router.threshold = torch.zeros_like(router.threshold)

    def export(self, weights: dict[str, torch.Tensor]) -> None:
        run_folder.save_model(self.recipe.folder, weights | self._frozen_weights())

    def _frozen_weights(self) -> dict[str, torch.Tensor]:
        """Those that did not train, in the precision they came in; an engine in bf16 has rounded its own."""
        initial = run_folder.load_initial(self.recipe.folder) if self.frozen else None
        frozen = {name for name, p in self.engine.module.module.named_parameters() if not p.requires_grad}
        return {} if initial is None else {name: value for name, value in initial[0].items() if name in frozen}

    # ------------------------------------------------------------------------------------------------------ one step

    def batches(self, step: int) -> list[Batch]:
        train = self.recipe.train
        return micro_batches(
            self.data.train,
            self.state["first_row"] + step * train.global_batch,
            train.global_batch,
            train.micro_batch,
            self.engine.ranks.rank,
            self.engine.ranks.world,
            step,
            self.recipe.seed,
        )

    def counts(self, batches: Sequence[Batch]) -> list[int]:
        """Target tokens of each modality, then tokens of each."""
        names = self.blueprint.modalities
        targets = [self.objective.counts(batch.context) for batch in batches]
        return [sum(c[name] for c in targets) for name in names] + [
            sum(batch.context.totals[m] for batch in batches) for m in range(len(names))
        ]

    def _split(self, totals: list[int]) -> tuple[dict[str, int], list[int]]:
        names = self.blueprint.modalities
        return dict(zip(names, totals[: len(names)], strict=True)), totals[len(names) :]

    def forward(
        self, batch: Batch, batches: int, totals: list[int], reporting: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        engine, (counts, tokens), trace = self.engine, self._split(totals), Trace()
        batch = Batch(batch.tokens, batch.context.replace(trace=trace)).to(engine.device)
        parts = {name: total for name, (total, _) in self.objective(engine.module, batch).items()}
        main = self.objective.combine(parts, counts)
        loss = main
        if trace.penalties:  # their mean over micro-batches and ranks
            balance = torch.stack(list(trace.penalties.values())).sum() / (batches * engine.ranks.world)
            loss = main + balance
            parts["balance"] = balance
        if trace.losses:
            auxiliary = sum(total for total, _ in trace.losses.values()) / max(sum(tokens), 1)
            loss = auxiliary if self.frozen else loss + AUXILIARY_SCALE * auxiliary
            parts["auxiliary"] = auxiliary
        self.updates.add(trace.updates)
        return loss, {**parts, "loss": main, **metrics.trace_sums(trace)} if reporting else {}

    def applied(self, step: int, applied: bool) -> None:
        self.updates.apply(step, applied)

    def account(self, totals: list[int]) -> None:
        _, tokens = self._split(totals)
        self.state["tokens"] += sum(tokens)
        cost, main = self.cost, 1.0 if self.frozen else TRAINING_FACTOR  # a frozen model runs forward alone
        self.state["flops"] += sum(
            n * (main * (cost.flops[m] + cost.router[m]) + TRAINING_FACTOR * cost.auxiliary[m])
            for m, n in enumerate(tokens)
        )

    # -------------------------------------------------------------------------------------------------------- reports

    def report(self, sums: dict[str, float], totals: list[int]) -> dict[str, float]:
        return metrics.step_values(sums, self._split(totals)[0])

    def line(self, step: int, report: dict[str, float], progress: metrics.Progress) -> str:
        routers = f"  routers {report['auxiliary/accuracy']:.1%} right" if self.frozen else ""
        return progress.line(step, report, self.blueprint.modalities) + routers

    def shown(self, key: str) -> bool:
        return "flops" not in key and (key.count("/") < 3 or "auxiliary" not in key)

    def judge(self, values: Mapping[str, float]) -> float:
        return validation_loss(values)

    def evaluate(self) -> dict[str, float] | None:
        if self.data.validation is None:
            return None
        values = evaluate(
            self.engine.module,
            self.blueprint,
            self.objective,
            self.data.validation,
            self.recipe.evaluate.rows,
            self.recipe.train.micro_batch,
            self.engine.device,
            self.engine.ranks.rank,
            self.engine.ranks.world,
            self.engine.ranks.sum,
        )
        # the loss of the best constant guess: what any model must beat
        return values | {f"eval/unigram/{name}": nats for name, nats in self.data.unigram_entropy("validation").items()}

    def finish(self) -> None:
        """Set the thresholds of the auxiliary routers on training rows not seen yet; collective.

        Rank 0 does it on a whole copy of the model, whatever the ZeRO stage.
        """
        recipe, engine = self.recipe, self.engine
        if not recipe.train.calibrate_rows:
            return
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
        found = engine.ranks.broadcast(found)
        for name, router in auxiliary_routers(engine.module.module).items():
            router.threshold = torch.tensor(found[name])


def _silent(text: str) -> None:
    pass


if __name__ == "__main__":
    leave(main())
