"""What a recipe assembles: its model without weights, parameters, FLOPs a token, memory a rank; nothing is
allocated."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import zoo
from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from zoo.modalities import vocabulary
from zoo.roles import Role, parameter_roles

BYTES = {"fp32": 4, "bf16": 2}


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


def describe(recipe: Recipe, model: zoo.Model, ranks: int) -> dict[str, Any]:
    """Figures of the model at the recipe's sequence length; `memory_per_rank` in bytes for its ZeRO stage."""
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
        "memory_per_rank": memory(recipe, total, ranks),
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


def memory(recipe: Recipe, parameters: int, ranks: int) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer state on one rank under the recipe's ZeRO stage; activations apart.

    fp32 weights are their own master copy at stage 0; ZeRO keeps a partitioned fp32 copy for the optimizer.
    """
    zero = recipes.launch_config(recipe, ranks)["zero_optimization"]
    stage = zero["stage"]
    element = BYTES[recipe.train.precision]
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    states = parameters * 4 * (2 if recipe.optimizer.type == "adamw" else 1)
    master = parameters * 4 if stage > 0 or recipe.train.precision == "bf16" else 0
    share = ranks if stage >= 1 else 1
    result = {
        "weights": parameters * element // (ranks if stage == 3 else 1),
        "gradients": parameters * 4 // (ranks if stage >= 2 else 1),
        "optimizer": (states + master) // share,
    }
    device = sum(result.values()) - (result["optimizer"] if offloaded else 0)
    return {"zero_stage": stage, "ranks": ranks, **result, "optimizer_offloaded": offloaded, "on_device": device}


def _auxiliary(model: nn.Module) -> int:
    """Parameters of the auxiliary routers."""
    role = parameter_roles(model)
    return sum(p.numel() for name, p in model.named_parameters() if role[name] is Role.AUXILIARY)
