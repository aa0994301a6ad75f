"""Steps as compiled graphs (`train.compile`): what can be compiled, and what a graph must not look at.

One graph serves every batch: numbers that change from batch to batch (tokens of each modality, the step) are inputs of
it. It is made anew where a batch is padded and none was before, or where a modality is absent. DeepSpeed's own
`compile` section belongs to its graph passes, which are extensions for GPUs; here PyTorch's compiler takes the model
that DeepSpeed runs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from zoo import noise
from zoo.attention import Attention
from zoo.block import LayerConfig
from zoo.config import ConfigError
from zoo.depth import MixtureOfDepths
from zoo.experts import ExpertConfig
from zoo.feedforward import Dense
from zoo.kernels import flex
from zoo.model import ModelConfig
from zoo.routing.scorer import Router

BACKEND = "inductor"
HOST_BOUND = ("per_document", "xformers")
"""Backends of attention that call a kernel for documents whose lengths the host reads: no graph may hold those."""


def check(model: ModelConfig, kernels: Mapping[str, str], activation_checkpointing: bool) -> None:
    """Raise ConfigError for what does not go with `train.compile: true`; `kernels` are the recipe's."""
    if activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing: does not go with train.compile: the compiler itself decides what is kept "
            "for the backward pass; remove one of them"
        )
    for index, layer in enumerate(model.layers):
        if not issubclass(layer.mixer.block, Attention):
            raise ConfigError(
                f"model.layers[{index}].mixer.type: {layer.mixer.type_name!r} does not go with train.compile: its "
                "kernels step through rows by index, outside of any graph; remove train.compile"
            )
        _check_routing(layer, f"model.layers[{index}]")
    if kernels.get("attention") in HOST_BOUND:
        raise ConfigError(
            f"kernels.attention: {kernels['attention']!r} does not go with train.compile: it reads the lengths of "
            "documents on the host, and every batch would need a graph of its own; use auto"
        )


def _check_routing(layer: LayerConfig, path: str) -> None:
    """Raise ConfigError where how many tokens go somewhere depends on the data: no graph may hold such a number."""
    inner, depth = layer.feedforward, layer.depth
    if isinstance(inner, ExpertConfig) and issubclass(inner.router.block, Router):
        raise ConfigError(
            f"{path}.feedforward.router.type: {inner.router.type_name!r} does not go with train.compile: how many "
            "tokens choose an expert depends on the data; let experts choose (type: linear), or remove train.compile"
        )
    if depth is None:
        return
    if not isinstance(depth, MixtureOfDepths.Config) or depth.scope != "row" or isinstance(depth.capacity, dict):
        raise ConfigError(
            f"{path}.depth: only one capacity for all tokens of a row (scope: row) goes with train.compile; remove "
            "train.compile, or change the layer"
        )
    untied = any(isinstance(part, Attention.Config | Dense.Config) and part.untied for part in (layer.mixer, inner))
    if untied or layer.untied_norms or (isinstance(inner, ExpertConfig) and list(inner.group_sizes()) != ["all"]):
        raise ConfigError(
            f"{path}.depth: does not go with train.compile where the layer treats modalities apart (moma, untied "
            "weights): how many tokens of each are kept depends on the data; remove train.compile, or make the layer's "
            "feed-forward dense"
        )


def check_stage(stage: int) -> None:
    """Raise ConfigError for a ZeRO stage under which nothing can be compiled."""
    if stage == 3:
        raise ConfigError(
            "train.compile: true does not go with deepspeed.zero_optimization.stage: 3, which gathers weights between "
            "any two modules: nothing is left to compile; use a stage up to 2"
        )


def kernels_for(kernels: Mapping[str, str], device: str) -> dict[str, str]:
    """The recipe's `kernels`, with attention of a kind that a graph can hold."""
    chosen = dict(kernels)
    if chosen.get("attention", "auto") == "auto":
        chosen["attention"] = "flex" if device == "cuda" and flex.missing() is None else "sdpa"
    return chosen


def compile_model(model: torch.nn.Module) -> None:
    """Compile the forward pass of `model` in place, at its first call; evaluation stays as it is (`run_compiled`)."""
    torch.compiler.assume_constant_result(noise.checksum)
    model.compile(backend=BACKEND, dynamic=True)


def run_compiled(on: bool) -> None:
    """Run compiled models by their graphs, or (evaluation) as they are written."""
    torch.compiler.set_stance("default" if on else "force_eager")
