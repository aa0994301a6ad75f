"""The second of MoMa's two stages (arXiv 2407.21770 §2.4): a trained run's causal routers learn, everything else
frozen."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from pretrain.data import open_data
from pretrain.process_group import rank_and_world
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from zoo.config import UserError
from zoo.kept import kept_files

STEPS, WARMUP_SHARE = 10_000, 5
KEPT = re.compile(r"(model|imports|modalities)(\..*)?")
"""What makes a model what it is: no override may change it."""


def second_stage(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the run that trains the routers of `run`.

    Raises:
        UserError: no such run, or an override changes the model.
    """
    path = run / run_folder.RECIPE
    if not path.exists():
        raise UserError(f"{path}: does not exist; give the folder of a run")
    run_folder.newest_checkpoint(run)
    old = recipes.load(path, [text for text in overrides if text.startswith("imports=")])
    over = {
        "name": f"{old.name}_routers",
        "run_dir": str(run.with_name(f"{run.name}_routers")),
        "modalities": {name: {"path": str(file)} for name, file in kept_files(run).items()},
        "model": with_auxiliary(old.model.model_dump(mode="json")),
        "optimizer": {"type": "adamw", "lr": 1e-4, "betas": list(old.optimizer.betas), "eps": old.optimizer.eps},
        "schedule": {"type": "linear", "warmup_steps": 0, "final_fraction": 0.01},
        "train": {"trainable": "auxiliary", "steps": STEPS, "calibrate_rows": 0},
    }
    recipe = recipes.load(path, overrides, over)
    if not any(text.startswith("schedule.warmup_steps") for text in overrides):
        over["schedule"]["warmup_steps"] = recipe.train.steps // WARMUP_SHARE
        recipe = recipes.load(path, overrides, over)
    lines = recipes.differences(recipes.load(path, (), over).dump(), recipe.dump(), only=KEPT)
    if recipe.train.trainable != "auxiliary":
        lines.append("train.trainable: 'auxiliary' is what this command does")
    if recipe.folder.resolve() == run.resolve():
        lines.append("run_dir: the seed's own folder; the routers need another")
    if lines:
        raise UserError(f"{run}: its model is frozen and no override may change it:\n  " + "\n  ".join(lines))
    return recipe


def with_auxiliary(config: Any) -> Any:
    """A copy of a model's config in which every block that can have an auxiliary router has one."""
    if isinstance(config, list):
        return [with_auxiliary(item) for item in config]
    if not isinstance(config, Mapping):
        return copy.copy(config)
    return {key: True if key == "auxiliary" else with_auxiliary(value) for key, value in config.items()}


def begin(run: Path, recipe: Recipe, fresh: bool) -> Initial:
    """First weights and data position of the second stage; rank 0 keeps them in its folder."""
    kept = run_folder.load_initial(recipe.folder)
    if kept is not None:
        return kept
    model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=recipe.seed)
    trained = run_folder.newest_weights(run)
    used = {name: value for name, value in trained.items() if not (fresh and ".auxiliary." in name)}
    initial = Initial({**model.state_dict(), **used}, run_folder.position(run))
    data = open_data(recipe.data, recipe.modalities, recipe.seed, log=_silent)
    run_folder.check_ids(run, data.modalities)
    if rank_and_world()[0] == 0:
        run_folder.save_initial(recipe.folder, initial)
    return initial


def _silent(text: str) -> None:
    pass
