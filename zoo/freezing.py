"""Training some modalities alone: what tokens of the others meet stays as it is (LMFusion, arXiv 2412.15188).

Rows that hold nothing but frozen modalities come out as before, to the bit. Where each modality has a weight of its own
in one stacked parameter (`zoo.untied`), the frozen ones get no gradient, and the others theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

from zoo.attention import Attention
from zoo.block import Block
from zoo.config import UserError
from zoo.experts import ExpertGroup, RoutedExperts
from zoo.feedforward import Dense
from zoo.layers import RMSNorm
from zoo.mamba import Recurrent
from zoo.model import Model
from zoo.untied import Grouping, ModalityLinear


def train_alone(model: Model, modalities: Collection[str]) -> None:
    """Leave nothing trainable but what tokens of `modalities` alone meet, on their way in, through, or out.

    Whatever is shared counts as met by all: ids, their embedding and their logits, tied weights, the routers of
    Mixture-of-Depths, and blocks that are not ours. A stacked parameter that trains in part must have neither weight
    decay nor anything else that changes a weight without a gradient.

    Raises:
        UserError: nothing is left to train.
    """
    frozen = {number for number, name in enumerate(model.modalities) if name not in modalities}
    own, stacks = _owners(model), _stacks(model)
    for name, parameter in model.named_parameters():
        grouping = stacks.get(name)
        if grouping is None:
            parameter.requires_grad_(name in own and own[name] not in frozen)
            continue
        still = sorted({group for number, group in enumerate(grouping.group) if number in frozen})
        parameter.requires_grad_(len(still) < grouping.count)
        if parameter.requires_grad and still:
            parameter.register_hook(_without(still, grouping.count))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"train.trainable: {', '.join(modalities)}: every weight of the model is shared with other modalities; "
            "untie some, or train all"
        )


def _without(groups: list[int], count: int) -> Callable[[Tensor], Tensor]:
    """A function from the gradient of a stack of `count` weights to one that is 0 at those of `groups`."""

    def kept(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        stack = gradient.view(count, -1)
        for group in groups:
            stack[group].zero_()
        return gradient

    return kept


def _owners(model: Model) -> dict[str, int]:
    """The parameters that tokens of a single modality meet, and which it is: those of its stem, its head, and of groups
    of experts that are its alone."""
    ends: list[tuple[nn.Module, int]] = []
    for number, name in enumerate(model.modalities):
        ends += [(part[name], number) for part in (model.stems, model.heads) if name in part]
    groups = [part for part in model.modules() if isinstance(part, ExpertGroup)]
    owned = ends + [(part, part.pool.modality) for part in groups if part.pool.modality is not None]
    of = {id(parameter): number for part, number in owned for parameter in part.parameters()}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def _stacks(model: Model) -> dict[str, Grouping]:
    """The parameters that hold one weight for each group of modalities, and the groups."""
    found = {}
    for name, part in model.named_modules():
        grouping = _grouping(part)
        if grouping is None or grouping.tied:
            continue
        for child_name, child in part.named_children():
            if isinstance(child, ModalityLinear | RMSNorm) and child.groups > 1:
                found[f"{name}.{child_name}.weight"] = grouping
        if isinstance(part, Recurrent) and part.bias_groups > 1:
            found[f"{name}.dt_bias"] = grouping
    return found


def _grouping(part: Any) -> Grouping | None:
    """How a part unties what it holds itself."""
    if isinstance(part, Block | RoutedExperts):
        return part.norm_grouping
    return part.grouping if isinstance(part, Attention | Recurrent | Dense) else None
