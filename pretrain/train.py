"""Pretraining: the entry point; what is special to it is in `pretrain.pretraining`.

    deepspeed --num_accelerators N --module pretrain.train RECIPE.yaml [key.sub=value ...]
    python -m pretrain.train RECIPE.yaml [key.sub=value ...]

The same command resumes. TERM, USR1 or Ctrl-C ends the run after the step in hand, with a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from pretrain import memory, run_folder
from pretrain import recipe as recipes
from pretrain.data import open_data
from pretrain.deepspeed_config import check_values
from pretrain.describe import blueprint, objective_of
from pretrain.loop import command, train
from pretrain.pretraining import Pretraining, auxiliary_routers
from pretrain.process_group import choose_device, leave, prepare_environment, rank_and_world
from pretrain.recipe import Recipe
from pretrain.run_folder import Initial
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return launch(lambda: recipes.load(options.recipe, options.overrides))


def launch(load: Callable[[], Recipe], begin: Callable[[Recipe], Initial | None] | None = None) -> int:
    """Train as a recipe says; every rank calls it. Mistakes of the user are printed, not raised.

    Args:
        load: gives the recipe, the same on every rank.
        begin: gives first weights and the position of the data, the same on every rank, or None to start from the
            seed; called once nothing is wrong with the recipe and rank 0 holds the folder. Default: what the folder
            has.
    Returns:
        The exit code.
    """

    def work(recipe: Recipe) -> None:
        rank, world = rank_and_world()
        device = choose_device(recipe.train.device)
        config = recipes.launch_config(recipe, world)
        check_memory(recipe, world, device)
        check_routers(recipe)
        run_folder.check_recipe(recipe.folder, recipe)
        data = open_data(recipe.data, recipe.modalities, recipe.seed, log=print if rank == 0 else _silent)
        prepare_environment(device, recipe.train.compile, recipe.train.deterministic)
        check_values(config)
        lock = run_folder.claim(recipe.folder) if rank == 0 else None  # last: until here nothing is written
        initial = begin(recipe) if begin else run_folder.load_initial(recipe.folder)
        train(Pretraining(recipe, data, config, device, initial), config)
        del lock

    return command(load, work)


def check_memory(recipe: Recipe, world: int, device: str) -> None:
    """Raise `ConfigError` where a rank needs more memory than the GPU has that it would run on."""
    if device == "cuda":
        parameters = sum(parameter.numel() for parameter in blueprint(recipe).parameters())
        needed = memory.of_rank(recipe, objective_of(recipe), parameters, world)
        memory.check_fits(needed, torch.cuda.get_device_properties(0).total_memory, spare=0.0)


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


def script() -> None:
    """The command `zoo-train`: as `python -m pretrain.train`."""
    leave(main())


def _silent(text: str) -> None:
    pass


if __name__ == "__main__":
    script()
