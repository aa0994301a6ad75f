"""Ways to lay a recipe's training out over ranks, and what a rank holds under each."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tqdm

from pretrain import deepspeed_config
from pretrain import recipe as recipes
from pretrain.describe import objective_of
from pretrain.memory import RankMemory, of_rank
from pretrain.recipe import Recipe
from zoo.model import Model

STAGES = {"bf16": (1, 2, 3), "fp32": (0, 1, 2, 3)}
"""Stages of ZeRO by precision: without ZeRO DeepSpeed keeps no fp32 copy of bf16 weights."""
CHECKPOINTING: dict[str, bool | Literal["selective"]] = {"none": False, "selective": "selective", "full": True}
"""Values of `train.activation_checkpointing` by what they are called here."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way; the ZeRO stage stands in `memory`."""

    precision: str
    checkpointing: str
    memory: RankMemory


def own(recipe: Recipe, ranks: int) -> tuple[str, str, int]:
    """Precision, checkpointing and ZeRO stage of the recipe itself."""
    checkpointing = next(
        name for name, value in CHECKPOINTING.items() if value == recipe.train.activation_checkpointing
    )
    stage = recipes.launch_config(recipe, ranks)["zero_optimization"]["stage"]
    return recipe.train.precision, checkpointing, stage


def layouts(recipe: Recipe, model: Model, ranks: int) -> list[Layout]:
    """All precisions × checkpointing × stages.

    Args:
        model: of the recipe, on the meta device.
    """
    parameters, objective = sum(p.numel() for p in model.parameters()), objective_of(recipe)
    section = {**deepspeed_config.read(recipe.deepspeed), "bf16": {"enabled": "auto"}}
    ways = [(precision, name) for precision in STAGES for name in CHECKPOINTING]
    found = []
    for precision, name in tqdm.tqdm(ways, desc="memory", disable=None, leave=False):
        train = recipe.train.model_copy(
            update={"precision": precision, "activation_checkpointing": CHECKPOINTING[name]}
        )
        changed = recipe.model_copy(update={"train": train})
        activations = None
        for stage in STAGES[precision]:
            zero = {**section.get("zero_optimization", {}), "stage": stage}
            staged = changed.model_copy(update={"deepspeed": {**section, "zero_optimization": zero}})
            first = stage == STAGES[precision][0]
            held = of_rank(staged, objective, parameters, ranks, with_activations=first)
            activations = held.activations if first else activations
            found.append(Layout(precision, name, dataclasses.replace(held, activations=activations)))
    return found
