"""The run folder: who owns it, which recipe it belongs to, and the trained model it leaves."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import zoo
from pretrain import recipe as recipes
from pretrain import recipe_file
from pretrain.checkpoint import STATE, CheckpointStore
from pretrain.engine import read_weights
from pretrain.environment import environment
from pretrain.optim import learning_rate_factor
from pretrain.recipe import Recipe, RunRecipe
from pretrain.watch import LOST
from zoo.config import ConfigError, UserError
from zoo.files import atomic_path, atomic_write, open_here, remove_leftovers
from zoo.kept import different, kept_files
from zoo.modality import Modality
from zoo.model import Model

RECIPE, WEIGHTS, CHECKPOINTS = recipe_file.RUN_RECIPE, "model.safetensors", "checkpoints"
ENVIRONMENT = "environment.json"
INITIAL, INITIAL_POSITION = "initial.safetensors", "initial.json"


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """Where the data of a run begin or go on."""

    row: int
    """Global number of the next packed row."""
    data: str
    """Fingerprint of the data whose rows are counted."""


@dataclasses.dataclass(frozen=True)
class Initial:
    """What a run starts from that does not start from its seed."""

    weights: dict[str, torch.Tensor]
    """By dotted name."""
    position: DataPosition


def claim(folder: Path) -> TextIO:
    """Take the folder for this run; the lock lives as long as the returned file (and this process) does.

    Raises:
        UserError: a live run has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(open_here(folder / ".lock", os.O_RDWR), "r+")
    except OSError as error:
        raise UserError(f"run_dir: {str(folder)!r} cannot be written ({error.strerror}); choose another") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(
            f"run_dir: {str(folder)!r} is in use by a live run; wait for it, stop it, or give this one another run_dir"
        ) from None
    remove_leftovers(folder)
    (folder / LOST).unlink(missing_ok=True)
    return file


def check_recipe(folder: Path, recipe: RunRecipe) -> None:
    """The folder is new, or belongs to this recipe.

    Raises:
        UserError: it belongs to another; every difference is named.
    """
    path = folder / RECIPE
    if not path.exists():
        return
    try:
        old = _recorded(path, recipe)
    except UserError as error:
        raise UserError(f"{error}. Restore it, or choose another run_dir") from None
    lines = recipes.differences(old, recipe.dump(), but=recipe.resumable)
    if lines:
        raise UserError(
            f"run_dir: {str(folder)!r} belongs to another recipe; choose another run_dir or name, or remove the folder."
            " Different are\n  " + "\n  ".join(lines)
        )


def _recorded(path: Path, recipe: RunRecipe) -> Mapping[str, Any]:
    """The recipe of a run as plain data. A key that it lacks has its default: the run may be older than the key.

    Args:
        recipe: of the same kind.
    Raises:
        UserError: the file cannot be read.
    """
    old = recipe_file.read(path)
    try:
        return type(recipe).parse(old).dump()
    except ConfigError:  # of another kind, or of an older library: the differences say in what
        return old


def changes(folder: Path, recipe: RunRecipe, step: int) -> list[str]:
    """By what a run that is resumed after `step` goes on otherwise than it would have, a line each."""
    path = folder / RECIPE
    if not path.exists():
        return [f"{path} is gone; that the checkpoint is of this recipe cannot be told but by its model and its data"]
    old = _recorded(path, recipe)
    lines = recipes.differences(old, recipe.dump(), only=recipes.CHANGES_TRAINING, but=None)
    now = recipe.train.steps
    before = old["train"].get("steps", now)
    planned, next_one = (learning_rate_factor(recipe.schedule, step, steps) for steps in (before, now))
    if planned != next_one:
        lines.append(
            f"train.steps: {before} there, {now} here: the learning rate goes on at {next_one:.1%} of its peak, where "
            f"{planned:.1%} was planned"
        )
    return [f"from step {step + 1} on: {line}" for line in lines]


def write_recipe(folder: Path, recipe: RunRecipe, effective: Mapping[str, Any]) -> None:
    """The resolved recipe, and beside it the dictionary DeepSpeed got and what the run is made with; atomic."""
    atomic_write(folder / ENVIRONMENT, json.dumps(environment(), indent=1) + "\n")
    atomic_write(folder / "deepspeed.json", json.dumps(effective, indent=1) + "\n")
    atomic_write(folder / RECIPE, yaml.safe_dump(recipe.dump(), sort_keys=False, allow_unicode=True))


def save_model(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Whole fp32 weights as safetensors; atomic.

    Raises:
        UserError: the disk is full.
    """
    path = folder / WEIGHTS
    try:
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    except SafetensorError as error:
        raise UserError(
            f"{str(path)!r} cannot be written ({error}); free space and give the same command again, it goes on from "
            "the newest checkpoint"
        ) from None
    return path


def newest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    steps = CheckpointStore(folder / CHECKPOINTS, keep=1).steps()
    if not steps:
        raise UserError(f"{folder / CHECKPOINTS}: holds no complete checkpoint; give the folder of a trained run")
    return folder / CHECKPOINTS / f"step-{steps[-1]}"


def newest_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and buffers of a run's newest checkpoint, whether it has finished or not.

    Raises:
        UserError: there is none.
    """
    trained = read_weights(newest_checkpoint(folder))
    initial = load_initial(folder)  # has the frozen ones, which a checkpoint leaves out
    return trained if initial is None else initial.weights | trained


def position(folder: Path) -> DataPosition:
    """Where the data of a run go on after its newest checkpoint.

    Raises:
        UserError: the run has no checkpoint.
    """
    checkpoint = newest_checkpoint(folder)
    recipe = recipes.load(folder / RECIPE)
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return DataPosition(state["first_row"] + state["step"] * recipe.train.global_batch, state["data"])


def check_ids(run: Path, modalities: Mapping[str, Modality]) -> None:
    """Raise UserError where ids or vectors of `modalities` mean something else than in `run`."""
    if changed := different(run, modalities):
        files = kept_files(run)
        named = " ".join(f"modalities.{name}.path={files[name]}" for name in changed if name in files)
        way_out = f"use the run's own: {named}" if named else "the recipe must say of them what the run's says"
        raise UserError(
            f"modalities: {', '.join(changed)}: ids mean something else than in {run}, though there may be as many; "
            f"{way_out}"
        )


def save_initial(folder: Path, initial: Initial) -> None:
    """Let a new run start from `initial`.

    Raises:
        UserError: the run has begun already.
    """
    if (folder / RECIPE).exists():
        raise UserError(
            f"run_dir: {str(folder)!r} is a run that has begun; choose another run_dir or name, or remove it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / INITIAL) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in initial.weights.items()}, temporary)
    atomic_write(folder / INITIAL_POSITION, json.dumps(dataclasses.asdict(initial.position)) + "\n")


def load_initial(folder: Path) -> Initial | None:
    """What `save_initial` left for a run, None where it starts from its seed."""
    if not (folder / INITIAL_POSITION).exists():
        return None
    position = DataPosition(**json.loads((folder / INITIAL_POSITION).read_text(encoding="utf-8")))
    return Initial(load_file(folder / INITIAL), position)


def load_model(folder: Path, device: str = "cpu") -> tuple[Model, Recipe]:
    """The trained model of a run, in evaluation mode, and its recipe.

    Raises:
        UserError: no such run, or it has not finished yet.
    """
    folder = Path(folder)
    for name, hint in (
        (RECIPE, "give the folder of a run"),
        (WEIGHTS, "it is written when the run ends or is told to stop"),
    ):
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: does not exist; {hint}")
    recipe = recipes.load(folder / RECIPE)
    model = zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.to(device).eval(), recipe
