"""Begin a run from the weights of another with fewer experts, tied weights or without MoD layers; see `zoo.upcycle`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

import zoo
from pretrain import run_folder
from pretrain.data import Data, open_data
from pretrain.describe import objective_of
from pretrain.evaluate import evaluate
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from zoo.modalities import vocabulary
from zoo.upcycle import upcycle


@dataclasses.dataclass(frozen=True)
class Begun:
    """A run that has first weights by now."""

    old: zoo.Model
    """The model they come from, in evaluation."""
    new: zoo.Model
    """The model that begins, in evaluation."""
    data: Data
    """Data of the new run."""
    row: int
    """Global row at which its data begin: where those of the old run stopped, if they are the same."""
    copied: int
    """How many weights come from the old model."""
    fresh: int
    """How many do not."""


def begin(old_run: Path, recipe: Recipe) -> Begun:
    """Write the first weights of the run of `recipe`, from those that `old_run` ended with.

    Raises:
        UserError: `old_run` has not ended, the new run has begun, weights have no counterpart, or ids mean something
            else.
    """
    old, old_recipe = run_folder.load_model(old_run)
    new = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=recipe.seed)
    made = upcycle(old.state_dict(), new, _ids(old_recipe, recipe))
    start = run_folder.position(old_run)
    data = open_data(recipe.data, recipe.modalities, recipe.seed, log=_silent)
    shared = {name: each for name, each in data.modalities.items() if name in old_recipe.modalities}
    run_folder.check_ids(old_run, shared)
    run_folder.save_initial(recipe.folder, Initial(made.weights, start))
    new.load_state_dict(made.weights)
    copied = sum(made.weights[name].numel() for name in made.origin)
    total = sum(value.numel() for value in made.weights.values())
    row = start.row if start.data == data.fingerprint else 0
    return Begun(old, new.eval(), data, row, copied, total - copied)


def _ids(old: Recipe, new: Recipe) -> Tensor | None:
    """(V,) for each id of the new model's that of the old one, −1 where it is new; None where all are the same."""
    before, after = vocabulary(old.modalities), vocabulary(new.modalities)
    if before == after:
        return None
    ids = torch.full((new.model.vocab_size or after.size,), -1)
    ids[: after.size] = torch.from_numpy(after.ids_in(before))
    return ids


def losses(model: zoo.Model, recipe: Recipe, data: Data, rows: int) -> dict[str, float]:
    """Losses of `pretrain.evaluate.evaluate` on the first `rows` held-out rows; none where `data` hold none out."""
    if data.validation is None or not rows:
        return {}
    values = evaluate(model, model, objective_of(recipe), data.validation, rows, recipe.train.micro_batch)
    return {name: value for name, value in values.items() if "/loss" in name}


def _silent(text: str) -> None:
    pass
