"""Whole models: does forward + backward cost what their FLOPs say? And what the optimizer's step costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import zoo
from pretrain.optim import OptimizerConfig, parameter_groups
from tools.bench.benchmark import Comparison, Goal, Group, Settings, benchmark, goals
from tools.bench.blocks import MODALITIES, alternating
from tools.bench.depth import layer
from tools.bench.experts import moma
from tools.bench.measure import STEP, Variant, both_modes
from zoo import TokenContext, Trace
from zoo.batch import Batch
from zoo.slots import Objective

ROWS, LENGTH, WIDTH, HIDDEN, LAYERS, VOCABULARY = 4, 1024, 512, 1344, 2, 1024
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def architectures(hidden: int) -> dict[str, list[dict[str, Any]]]:
    """Patterns of layers by name; routers for causal use are left out."""
    dense = layer(hidden)
    routed = dense | {"feedforward": moma(hidden)}
    untied = {
        "mixer": dense["mixer"] | {"untied": PROJECTIONS},
        "feedforward": dense["feedforward"] | {"untied": True},
        "untied_norms": True,
    }
    mod = {"depth": {"type": "mod", "capacity": 0.25, "auxiliary": False}}
    return {
        "dense": [dense],
        "MoMa 4t4i": [routed],
        "Mixture-of-Transformers": [untied],
        "MoD 25% of every other layer": [dense | mod, dense],
        "MoD + MoMa 4t4i": [routed | mod, routed],
    }


def build(layers: list[dict[str, Any]], width: int) -> zoo.Model:
    repeat = LAYERS // len(layers)
    config = {
        "modalities": list(MODALITIES),
        "d_model": width,
        "vocab_size": VOCABULARY,
        "layers": layers,
        "repeat": repeat,
    }
    return zoo.build("model", config)


def loss_of(model: nn.Module, objective: Objective, tokens: Tensor, modality: Tensor) -> Tensor:
    """A training loss, context and all that layers derive from it included."""
    context = TokenContext.from_modality(modality, modalities=MODALITIES, trace=Trace()).to(tokens.device)
    sums = objective(model, Batch(tokens, context))
    return objective.combine(sums, dict.fromkeys(sums, tokens.numel() / len(MODALITIES)))


def flops(model: zoo.Model, length: int) -> float:
    """FLOPs of a forward, a token, with as many tokens of each modality; routers apart."""
    each = model.cost(length).flops
    return sum(each) / len(each)


@benchmark("model.flops")
def models_follow_flops(settings: Settings) -> Group:
    """Loss and gradients of 4-layer models, B=2 T=1024 D=512 F=1344, over the dense one's, relative to their FLOPs."""
    length, width = settings.size(LENGTH), settings.size(WIDTH)
    modality = alternating(ROWS, length).modality
    tokens = torch.randint(VOCABULARY, modality.shape)
    objective = zoo.build("objective", {"type": "autoregressive"}, modalities=MODALITIES)
    models = {name: build(layers, width) for name, layers in architectures(settings.size(HIDDEN)).items()}
    variants = {
        name: Variant(lambda model=model: loss_of(model, objective, tokens, modality), list(model.parameters()))
        for name, model in models.items()
    }
    dense = flops(models["dense"], length)
    pairs = [
        Comparison(
            name,
            "dense",
            goals=goals(both=Goal(aim=1.10)),
            expected=flops(model, length) / dense,
            note="context, loss and head included; optimizer apart",
        )
        for name, model in models.items()
        if name != "dense"
    ]
    return Group(both_modes(variants), pairs)


@benchmark("model.optimizer")
def optimizer_step(settings: Settings) -> Group:
    """Fused AdamW's step over all parameters of the same models: it grows with parameters, not with FLOPs."""
    variants, parameters = {}, {}
    for name, layers in architectures(settings.size(HIDDEN)).items():
        model = build(layers, settings.size(WIDTH))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
        groups = parameter_groups(model, OptimizerConfig(lr=1e-9))
        known = [{key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")} for group in groups]
        variants[name] = torch.optim.AdamW(known, fused=True).step
    pairs = [
        Comparison(name, "dense", note=f"{count / parameters['dense']:.2f} times the parameters")
        for name, count in parameters.items()
        if name != "dense"
    ]
    return Group({STEP: variants}, pairs)
