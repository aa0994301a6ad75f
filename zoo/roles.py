"""Roles: what each parameter is for, declared by the module that makes it, so that nobody guesses it from a name.

The optimizer groups parameters by role, upcycling copies by role, and reports count by role. Parameters of modules that
declare nothing, those of a pretrained model of Transformers, get the role that the kind of their module and their shape
suggest (`role_by_kind`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Role(enum.Enum):
    """What a parameter is for."""

    MATRIX = "the matrix of a linear map, one for all tokens"
    MODALITY_MATRIX = "matrices of a linear map, one for each modality or tower, stacked"
    EXPERT_MATRIX = "matrices, one for each expert, stacked"
    CONVOLUTION = "taps of a convolution"
    EMBEDDING = "vectors that are looked up: tokens, positions, patches"
    HEAD = "the matrix from the last layer to the vocabulary"
    GAIN = "gain of a norm, one or one for each modality"
    BIAS = "any other vector"
    MODALITY_BIAS = "biases, one for each modality or tower, end to end in one vector"
    RECURRENCE = "decay and skip of a recurrence (A_log and D of Mamba)"
    ROUTER = "router: scores tokens"
    ADDED_ROUTER = "router added to a pretrained model"
    AUXILIARY = "auxiliary router: predicts, without looking ahead, what a router decides"


class ParameterOwner(nn.Module):
    """A module with parameters of its own. It says what they are for and how they begin."""

    roles: Mapping[str, Role] = {}
    """Role of its own parameters by name; `role_by_kind` decides for one that is not listed."""

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Write the first value of its own parameter `name` into `parameter`, drawing from `generator` alone."""
        raise TypeError(f"{type(self).__name__} owns {name!r} but has no initialise(name, parameter, generator)")


Shape = Callable[[Tensor], tuple[int, ...]]


def parameter_roles(model: nn.Module, shape: Shape = lambda parameter: tuple(parameter.shape)) -> dict[str, Role]:
    """The role of every parameter of `model`, by dotted name, in the order of `named_parameters`.

    Args:
        shape: whole shape of a parameter, where it is partitioned.
    """
    heads = {part for module in model.modules() for part in _head_modules(module)}
    roles = {}
    for prefix, module in model.named_modules():
        declared = module.roles if isinstance(module, ParameterOwner) else {}
        for name, parameter in module.named_parameters(recurse=False):
            role = declared.get(name) or role_by_kind(module, name, shape(parameter), module in heads)
            roles[f"{prefix}.{name}" if prefix else name] = role
    return {name: roles[name] for name, _ in model.named_parameters()}


def role_by_kind(module: nn.Module, name: str, shape: tuple[int, ...], head: bool = False) -> Role:
    """The role of a parameter that nobody has declared. The first line that fits decides:

    - fewer than two dimensions: BIAS
    - in an `nn.Embedding`, in a convolution whose stride is its kernel (it cuts patches), in a module that contains
      nothing but such modules (positions and class tokens beside them), or called an embedding: EMBEDDING
    - of one vector, however many dimensions it is written in: BIAS
    - `weight` of a norm of torch: GAIN
    - in the module that gives logits: HEAD
    - in another convolution: CONVOLUTION
    - two dimensions: MATRIX; more: EXPERT_MATRIX

    Args:
        module: that the parameter belongs to.
        name: of the parameter in `module`.
        shape: of the whole parameter.
        head: whether `module` gives logits (`get_output_embeddings` of a model of Transformers).
    """
    if len(shape) < 2:
        return Role.BIAS
    inner = [
        part
        for part in module.modules()
        if part is not module and next(part.parameters(recurse=False), None) is not None
    ]
    if _embeds(module) or (inner and all(map(_embeds, inner))) or "embedding" in name:
        return Role.EMBEDDING
    if sum(size > 1 for size in shape) < 2 and len(shape) > 2:
        return Role.BIAS
    if name == "weight" and isinstance(module, NORMS):
        return Role.GAIN
    if head:
        return Role.HEAD
    if isinstance(module, nn.modules.conv._ConvNd):
        return Role.CONVOLUTION
    return Role.MATRIX if len(shape) == 2 else Role.EXPERT_MATRIX


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._BatchNorm)


def _embeds(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.stride == module.kernel_size and max(module.kernel_size) > 1
    return isinstance(module, nn.Embedding)


@runtime_checkable
class _WithHead(Protocol):
    """A model of Transformers."""

    def get_output_embeddings(self) -> Any: ...


def _head_modules(module: nn.Module) -> list[nn.Module]:
    """The modules that give the logits of a model of Transformers; none for other modules."""
    head = module.get_output_embeddings() if isinstance(module, _WithHead) else None  # pyrefly: ignore[unsafe-overlap]
    return [] if head is None else list(head.modules())
