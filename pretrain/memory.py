"""What a rank of a run holds: weights, gradients and optimizer states by ZeRO's stage, activations and logits by a
micro-batch that is run on the meta device, where nothing is computed or allocated and every storage is counted."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zoo
from pretrain import recipe as recipes
from pretrain.describe import objective_of
from pretrain.recipe import Recipe
from zoo.batch import Batch
from zoo.carries import nothing
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.storages import StorageMeter
from zoo.trace import Trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARE = 0.1
"""Share of an accelerator's memory that is left to the allocator's gaps, to communication and to kernels' workspaces."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch holds beside weights, with fused kernels as on a GPU. Gradients of weights go as soon
    as they are whole, as ZeRO takes them over."""

    peak: int
    """Most at once, over forward and backward pass."""
    held: int
    """At the end of the forward pass."""
    logits: int
    """All logits in fp32. They never exist at once where they are large, see `zoo.cross_entropy`."""


def activations(recipe: Recipe) -> Activations | None:
    """What a micro-batch of full rows holds; None where a block of the model cannot be run without values."""
    with torch.device("meta"):
        model = zoo.build(
            "model",
            recipe.model,
            activation_checkpointing=recipe.train.activation_checkpointing,
            kernels={"experts": recipe.kernels.get("experts", "auto")},
            seed=None,
        )
    try:
        return measure(model.to(DTYPES[recipe.train.precision]), objective_of(recipe), batch_of(recipe))
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return None


def measure(model: zoo.Model, objective: zoo.Objective, batch: Batch) -> Activations:
    """What forward and backward of a batch hold on the model's device, the batch itself included.

    Args:
        batch: on the host.
    """
    model.train()
    counts, device = objective.counts(batch), model.norm.weight.device
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_forget)
    with StorageMeter([*model.parameters(), *model.buffers()]) as meter, _FusedNorm():
        trace = Trace()
        sums = objective(model, batch.under(trace=trace).to(device))
        loss = objective.combine(sums, counts)
        loss = loss + sum((total for total, _ in trace.losses.values()), loss.new_zeros(()))
        held = meter.now
        loss.backward()
    logits = batch.tokens.numel() * model.head.weight.shape[0] * 4
    return Activations(meter.peak, held, logits)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _FusedNorm(TorchFunctionMode):
    """RMSNorm as a GPU has it, which keeps its input and a number a row; without values torch takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.rms_norm and args[0].is_meta:
            return torch._fused_rms_norm(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def batch_of(recipe: Recipe) -> Batch:
    """A micro-batch of full rows, on the host: documents of an item of each modality and as much text before it."""
    names, length, rows = list(recipe.model.modalities), recipe.data.sequence_length, recipe.train.micro_batch
    modality, document, item = ([] for _ in range(3))
    text = names.index(next(name for name, kind in recipe.modalities.items() if kind.positions is None))
    sizes = {names.index(name): kind.positions.most for name, kind in recipe.modalities.items() if kind.positions}
    number = 0
    while len(modality) < length:
        for m, size in (sizes or {text: length}).items():
            modality += [text] * size + [m] * size
            inside = number if recipe.modalities[names[m]].bidirectional else -1
            item += [-1] * size + [inside] * size
            document += [number] * (2 * size)
            number += 1
    columns = [torch.tensor(column[:length]).expand(rows, -1).contiguous() for column in (modality, document, item)]
    context = TokenContext.from_modality(
        columns[0], columns[1], item=columns[2] if recipe.bidirectional else None, modalities=tuple(names)
    )
    content = {}
    for name in recipe.model.own_stems:
        empty = nothing(recipe.modalities[name].carries)
        content[name] = empty.new_zeros(context.totals[names.index(name)], *empty.shape[1:])
    return Batch(torch.zeros(context.shape, dtype=torch.int64), context, content)
