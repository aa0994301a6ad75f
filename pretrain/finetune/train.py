"""Fine-tuning of multimodal LLMs, made sparse or as they are: the entry point; what is special to it is in
`pretrain.finetune.task`.

    deepspeed --num_accelerators N --module pretrain.finetune RECIPE.yaml [key.sub=value ...]
    python -m pretrain.finetune RECIPE.yaml [key.sub=value ...]

The same command resumes. TERM, USR1 or Ctrl-C ends the run after the step in hand, with a checkpoint. The trained
model is left in <run>/model, for `zoo.adapt.load_adapted`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pretrain import recipe as recipes
from pretrain import run_folder
from pretrain.data.errors import DataError
from pretrain.deepspeed_config import check_values
from pretrain.finetune import recipe as finetune_recipe
from pretrain.finetune.batcher import Batcher
from pretrain.finetune.questions import Question
from pretrain.finetune.recipe import FinetuneRecipe
from pretrain.finetune.samples import open_questions, too_many, usable
from pretrain.finetune.task import FineTuning
from pretrain.loop import command, train
from pretrain.process_group import choose_device, leave, prepare_environment, rank_and_world
from zoo.config import ConfigError

if TYPE_CHECKING:
    from pretrain.finetune.model import Base


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pretrain.finetune", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recipe", help="YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return command(lambda: finetune_recipe.load(options.recipe, options.overrides), work)


def script() -> None:
    """The command `zoo-finetune`: as `python -m pretrain.finetune`."""
    leave(main())


def work(recipe: FinetuneRecipe) -> None:
    """Tune a model as the recipe says; every rank calls it.

    Raises:
        UserError: a mistake of the user's; until the run has its folder nothing is written.
    """
    rank, world = rank_and_world()
    device = choose_device(recipe.train.device)
    prepare_environment(device, deterministic=recipe.train.deterministic)
    from pretrain.finetune.model import open_base, quiet  # brings in libraries that bring in DeepSpeed

    quiet(rank)
    base = open_base(recipe)
    if base.adapt is not None and base.adapt.router.type == "attention":
        raise ConfigError(
            "adapt.router.type: 'attention' ranks tokens by what the end of a sequence attends to, in training the end "
            "of its answer; it is judged without training (zoo.adapt.adapt, tools.sweep), or choose linear"
        )
    config = recipes.deepspeed_for(recipe, world, base.d_model)
    check_values(config)
    run_folder.check_recipe(recipe.folder, recipe)
    training = open_questions(recipe.data.path, "train")
    held_out = open_questions(recipe.data.path, recipe.evaluate.split)[: recipe.evaluate.samples]
    batchers = [_batcher(base, training, recipe, mode) for mode in (True, False)]
    log = functools.partial(print, flush=True) if rank == 0 else lambda line: None
    held_out = usable(held_out, batchers[1], recipe.data.max_broken_samples, log)
    lock = run_folder.claim(recipe.folder) if rank == 0 else None
    task = FineTuning(recipe, base, training, held_out, batchers, config, device)
    train(task, config)
    del lock


def _batcher(base: Base, training: Sequence[Question], recipe: FinetuneRecipe, mode: bool) -> Batcher:
    """With the first question about images that can be used as its filler.

    Raises:
        DataError: too many cannot be used.
    """
    reasons: list[str] = []
    for question in (question for question in training if question.images):
        try:
            return Batcher(
                base.processor,
                question,
                base.config,
                base.pictures,
                base.adapt,
                training=mode,
                maximum_length=recipe.data.maximum_length if mode else None,
            )
        except DataError as error:
            reasons.append(str(error))
            if len(reasons) > recipe.data.max_broken_samples:
                break
    raise too_many(recipe.data.max_broken_samples, len(reasons), len(reasons), reasons)
