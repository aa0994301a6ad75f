"""The trainings that a choice of mixtures needs, and the losses of merged and of really trained models."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tqdm
import yaml

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from pretrain.data import Mixture, open_data
from pretrain.describe import objective_of
from pretrain.evaluate import evaluate, validation_loss
from pretrain.recipe import Recipe
from pretrain.recipe_file import merge
from tools.mixture.merge import merged, simplex
from tools.mixture.settings import MixtureConfig, Weights, normal, sources
from tools.sweep.pretrain.run import train_stage
from zoo.config import UserError
from zoo.files import atomic_write
from zoo.kept import kept_files

START, LOSSES = "start", "losses.json"


@dataclasses.dataclass(frozen=True)
class Tried:
    """A mixture, and what a model for it loses."""

    weights: Weights
    losses: dict[str, float]
    """Causal validation loss in nats a token on each source's held-out documents."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Everything that was evaluated."""

    merged: list[Tried]
    """The merges on the grid."""
    trained: list[Tried]
    """The models really trained on the mixtures to check."""
    stand_ins: list[Tried]
    """The merges for these mixtures, in the same order."""
    start: Tried
    """The model that all others go on from."""


def run(config: MixtureConfig, out: Path) -> Found:
    """Train what is not trained yet, and evaluate.

    Raises:
        UserError: a mistake of the user's, or a training failed.
    """
    base = config.base()
    recipe = recipes.resolve(base)
    names = sources(recipe)
    folders = out / "runs"
    folders.mkdir(parents=True, exist_ok=True)
    start = folders / START
    _train(merge(base, {"train": {"steps": config.start_steps}}), start, None, config)
    checks = [normal(each, names) for each in config.check]
    wanted = {f"only-{name}": normal({name: 1}, names) for name in names}
    wanted |= {f"check-{number}": weights for number, weights in enumerate(checks)}
    for name, weights in wanted.items():
        _train(_on(base, weights, start), folders / name, start, config)
    judge = Judge(recipes.resolve(_on(base, normal(dict.fromkeys(names, 1.0), names), start)), out / LOSSES)
    ends = {name: _weights(folders / f"only-{name}") for name in names}
    everything = [(merged(ends, weights), weights) for weights in checks]
    stand_ins = [judge.of(f"merged {weights}", weights, state) for state, weights in everything]
    trained = [judge.of(f"check-{n}", w, _weights(folders / f"check-{n}")) for n, w in enumerate(checks)]
    grid = simplex(names, config.parts)
    bar = tqdm.tqdm(grid, desc="merged models", unit="model", disable=None)
    on_grid = [judge.of(f"merged {weights}", weights, merged(ends, weights)) for weights in bar]
    at_start = judge.of(START, {}, _weights(start))
    return Found(on_grid, trained, stand_ins, at_start)


def _on(base: Mapping[str, Any], weights: Weights, start: Path) -> dict[str, Any]:
    """The recipe of a run on a mixture, with what the modalities of the start have learned."""
    data = merge(dict(base), {"modalities": {name: {"path": str(file)} for name, file in kept_files(start).items()}})
    entries = {n: e | {"weight": weights[n]} for n, e in data["data"]["sources"].items() if weights[n] > 0}
    return {**data, "data": {**data["data"], "sources": entries}}


def _train(data: Mapping[str, Any], run: Path, before: Path | None, config: MixtureConfig) -> None:
    """Train a run to its end; nothing happens where it has ended.

    Raises:
        UserError: the folder's run has another recipe, or the training failed.
    """
    data = {**data, "name": run.name, "run_dir": str(run)}
    recipe = recipes.resolve(data)
    run_folder.check_recipe(run, recipe)
    if _done(run) >= recipe.train.steps:
        return
    run.with_suffix(".yaml").write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
    print(f"{run.name}: {recipe.train.steps} steps", file=sys.stderr, flush=True)
    train_stage("train" if before is None else "upcycle", run, before, config.accelerators)
    if _done(run) < recipe.train.steps:
        raise UserError(f"{run} was told to stop after {_done(run)} of {recipe.train.steps} steps")


def _done(run: Path) -> int:
    """Steps that a run has done and written its weights after."""
    if not (run / run_folder.WEIGHTS).exists():
        return 0
    return int(run_folder.newest_checkpoint(run).name.rpartition("-")[2])


def _weights(run: Path) -> dict[str, Any]:
    return run_folder.load_model(run)[0].state_dict()


class Judge:
    """Evaluates models on the held-out documents of each source; what it has found it keeps.

    Args:
        recipe: of the models, with all sources.
        path: JSON file of the losses found so far, by the name of what was evaluated.
    """

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self.recipe, self.path = recipe, path
        self.found: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}
        held_out = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda text: None).validation
        streams = {} if held_out is None else held_out.streams
        if missing := [name for name in sources(recipe) if name not in streams]:
            raise UserError(
                f"data.sources.{missing[0]}.validation: null holds nothing out; give each source documents to judge by"
            )
        self.streams = {name: Mixture({name: stream}, {name: 1.0}, None) for name, stream in streams.items()}
        self.model: Any = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None).eval()

    def of(self, name: str, weights: Weights, state: Mapping[str, Any]) -> Tried:
        """The losses of a model with these parameters and buffers."""
        if name not in self.found:
            self.model.load_state_dict(state)
            self.found[name] = {source: self._loss(stream) for source, stream in self.streams.items()}
            atomic_write(self.path, json.dumps(self.found, indent=1) + "\n")
        return Tried(weights, self.found[name])

    def _loss(self, stream: Mixture) -> float:
        recipe = self.recipe
        rows, batch = recipe.evaluate.rows, recipe.train.micro_batch
        return validation_loss(evaluate(self.model, self.model, objective_of(recipe), stream, rows, batch))
