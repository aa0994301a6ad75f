"""Ways to lay a recipe's training out over ranks, and what a rank holds under each."""

from __future__ import annotations

import dataclasses
from typing import Literal

import tqdm

from pretrain import deepspeed_config
from pretrain import memory as held
from pretrain import recipe as recipes
from pretrain.describe import memory as states
from pretrain.recipe import Recipe
from zoo.model import Model

STAGES = {"bf16": (1, 2, 3), "fp32": (0, 1, 2, 3)}
"""Stages of ZeRO by precision: without ZeRO DeepSpeed keeps no fp32 copy of bf16 weights."""
CHECKPOINTING: dict[str, bool | Literal["selective"]] = {"none": False, "selective": "selective", "full": True}
"""Values of `train.activation_checkpointing` by what they are called here."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way, and the bytes that a rank's accelerator holds under it."""

    precision: str
    checkpointing: str
    stage: int
    states: float
    """Weights, gradients, and optimizer states that are not offloaded."""
    activations: float | None
    """Most at once beside these, the loss included; None where the model cannot be followed without values."""
    logits: float
    """All logits of a micro-batch in fp32; they exist at once only where they are small."""

    @property
    def total(self) -> float | None:
        """All of it at once: gradients of the last micro-batch are there before its activations are gone."""
        return None if self.activations is None else self.states + self.activations


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
    parameters = sum(p.numel() for p in model.parameters())
    size = recipe.train.micro_batch * recipe.data.sequence_length * (recipe.model.vocab_size or 0) * 4
    found = []
    ways = [(precision, name) for precision in STAGES for name in CHECKPOINTING]
    section = {**deepspeed_config.read(recipe.deepspeed), "bf16": {"enabled": "auto"}}
    for precision, name in tqdm.tqdm(ways, desc="memory", disable=None, leave=False):
        train = recipe.train.model_copy(
            update={"precision": precision, "activation_checkpointing": CHECKPOINTING[name]}
        )
        changed = recipe.model_copy(update={"train": train})
        activations = held.activations(changed)
        for stage in STAGES[precision]:
            zero = {**section.get("zero_optimization", {}), "stage": stage}
            staged = changed.model_copy(update={"deepspeed": {**section, "zero_optimization": zero}})
            on_device = states(staged, parameters, ranks)["on_device"]
            found.append(
                Layout(precision, name, stage, on_device, None if activations is None else activations.peak, size)
            )
    return found
