"""What a recipe assembles: its model without weights, parameters, FLOPs a token, memory a rank; nothing is
allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import zoo
from pretrain import memory
from pretrain.recipe import Recipe
from zoo.modalities import vocabulary
from zoo.roles import Role, parameter_roles


def blueprint(recipe: Recipe) -> zoo.Model:
    """The recipe's model on the meta device, without weights: says what it costs and what it is made of."""
    with torch.device("meta"):
        return zoo.build("model", recipe.model, kernels=recipe.kernels, seed=None)


def objective_of(recipe: Recipe) -> zoo.Objective:
    """What the recipe's model is trained for."""
    return zoo.build(
        "objective",
        recipe.objective,
        d_model=recipe.model.d_model,
        modalities=tuple(recipe.model.modalities),
        heads=recipe.model.own_heads,
        bidirectional=recipe.bidirectional,
    )


def describe(recipe: Recipe, model: zoo.Model, ranks: int, with_activations: bool = True) -> dict[str, Any]:
    """Figures of the model at the recipe's sequence length.

    Args:
        with_activations: whether `memory_per_rank`, in bytes, has those of a micro-batch, see `pretrain.memory`.
    """
    cost = model.cost(recipe.data.sequence_length)
    total = sum(p.numel() for p in model.parameters())
    modalities = recipe.model.modalities
    return {
        "name": recipe.name,
        "layers": len(model.layers),
        "d_model": recipe.model.d_model,
        "tokens": recipe.data.sequence_length,
        "end_parameters": end_parameters(model),
        "parameters": {"total": total, "active": round(max(cost.active)), "auxiliary": _auxiliary(model)},
        "active_parameters": dict(zip(modalities, map(round, cost.active), strict=True)),
        "flops_per_token": dict(zip(modalities, cost.flops, strict=True)),
        "router_flops_per_token": dict(zip(modalities, cost.router, strict=True)),
        "auxiliary_flops_per_token": dict(zip(modalities, cost.auxiliary, strict=True)),
        "vocabulary": vocabulary_ranges(recipe),
        "memory_per_rank": memory.of_rank(recipe, objective_of(recipe), total, ranks, with_activations).facts(),
    }


def end_parameters(model: zoo.Model) -> dict[str, int]:
    """Parameters of stems and heads: of all ids together, as `ids`, and of each modality that carries none."""
    ends = {"ids": (model.embedding, model.head)}
    ends |= {name: (model.stems[name], model.heads[name]) for name in model.stems}
    return {name: sum(p.numel() for part in parts for p in part.parameters()) for name, parts in ends.items()}


def vocabulary_ranges(recipe: Recipe) -> dict[str, Any]:
    """The ids of the special tokens by name, the range [start, stop) of each modality's, and how many there are."""
    words = vocabulary(recipe.modalities)
    ranges = {name: list(words.range(name)) for name in words.modalities}
    return {"special": words.specials, "ranges": ranges, "size": words.size}


def _auxiliary(model: nn.Module) -> int:
    """Parameters of the auxiliary routers."""
    role = parameter_roles(model)
    return sum(p.numel() for name, p in model.named_parameters() if role[name] is Role.AUXILIARY)
