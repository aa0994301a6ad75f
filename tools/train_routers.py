"""Train the causal (auxiliary) routers of a trained run, everything else frozen.

    deepspeed --num_accelerators N --module tools.train_routers RUN [key.sub=value ...]

The second of MoMa's two stages (arXiv 2407.21770 §2.4): RUN is the folder of a run with routed blocks that has a
checkpoint. Its newest weights go unchanged into a new run, `RUN_routers` (another: run_dir=PATH), where the auxiliary
routers learn to predict the top-k by which the finished model routes. Routers that RUN has trained go on, or begin
anew with `--fresh`; a RUN with `auxiliary: false` gets its first ones. The data go on where RUN stopped. The same
command resumes.

The paper's settings are the default: AdamW, 10,000 steps, learning rate from 1e-4 linearly to 1e-6 after a warm-up of
a fifth of the steps; the batch is RUN's. `train.calibrate_rows=ROWS` sets thresholds at the end, so that causal routing
takes as many tokens as top-k did.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder, train
from pretrain.process_group import leave, rank_and_world
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from zoo.config import UserError

STEPS, WARMUP_SHARE = 10_000, 5
KEPT = re.compile(r"(model|imports|data\.(text|image|audio))(\..*)?")
"""What makes a model what it is: no override may change it."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.train_routers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--fresh", action="store_true", help="begin anew where RUN has auxiliary routers")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return train.launch(
        lambda: second_stage(options.run, options.overrides), lambda recipe: begin(options.run, recipe, options.fresh)
    )


def second_stage(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the run that trains the routers of `run`.

    Raises:
        UserError: no such run, or an override changes the model.
    """
    path = run / run_folder.RECIPE
    if not path.exists():
        raise UserError(f"{path}: does not exist; give the folder of a run")
    run_folder.newest_checkpoint(run)
    old = recipes.load(path)
    over = {
        "name": f"{old.name}_routers",
        "run_dir": str(run.with_name(f"{run.name}_routers")),
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
    if rank_and_world()[0] == 0:
        run_folder.save_initial(recipe.folder, initial)
    return initial


if __name__ == "__main__":
    leave(main())
