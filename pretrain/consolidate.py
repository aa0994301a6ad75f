"""Whole weights out of the files that ranks have saved, at any ZeRO stage, one at a time, on a CPU, without an engine.

Files are mapped, not read: what is in memory at any time is the weights that a caller has asked for and keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pretrain import deepspeed_patches
from zoo.config import UserError

STAGE_3 = 3


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight or buffer that lies in files."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """Makes it whole."""


StoredWeights = dict[str, StoredWeight]
"""By dotted name."""


def stored_in_safetensors(path: Path) -> StoredWeights:
    """The weights in a safetensors file.

    Raises:
        UserError: it is damaged.
    """
    try:
        file = safe_open(path, "pt")
        meta = {name: file.get_slice(name) for name in file.keys()}
        return {
            name: StoredWeight(
                tuple(part.get_shape()), _DTYPES[part.get_dtype()], functools.partial(file.get_tensor, name)
            )
            for name, part in meta.items()
        }
    except (SafetensorError, OSError, KeyError) as error:
        raise UserError(f"{path}: is damaged ({error}); restore it, or resume the run, which writes it anew") from None


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16} | {
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
    "U8": torch.uint8,
}


def stored_in_checkpoint(folder: Path) -> StoredWeights:
    """fp32 weights, and buffers, of what `Engine.save` wrote below `folder` at any stage; frozen weights are not there.

    Args:
        folder: that of the ranks' files.
    Raises:
        UserError: a file holds more than tensors and plain values.
    """
    models = [_load(path) for path in _in_order(folder, "*_model_states.pt")]
    optimizers = [_load(path)["optimizer_state_dict"] for path in _in_order(folder, "*_optim_states.pt")]
    module = models[0]["module"]
    if not optimizers:  # stage 0 keeps whole weights beside the model
        return {name: _there(value) for name, value in module.items()}
    weights = {name: _there(value) for name, value in module.items() if name in models[0]["buffer_names"]}
    groups: Sequence[Mapping[str, Any]] = models[0]["param_shapes"]
    if optimizers[0].get("zero_stage") == STAGE_3:
        weights |= _of_stage_3({k: v for group in groups for k, v in group.items()}, optimizers)
    else:  # stages 1 and 2, and stage 1 in bf16, whose optimizer is another with the same flat groups
        weights |= _of_stage_2(groups, optimizers)
    return weights | {name: weights[other] for name, other in models[0]["shared_params"].items() if other in weights}


def _load(path: Path) -> dict[str, Any]:
    with deepspeed_patches.tensors_only():
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _in_order(folder: Path, pattern: str) -> list[Path]:
    """Files by rank."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _there(value: Tensor) -> StoredWeight:
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return StoredWeight(tuple(value.shape), dtype, lambda: value.to(dtype, copy=True))


def _of_stage_2(groups: Sequence[Mapping[str, Any]], optimizers: Sequence[Mapping[str, Any]]) -> StoredWeights:
    """Every rank holds an equal part of each group's weights laid end to end."""
    found, paddings = {}, optimizers[0].get("param_alignment_paddings")
    for number, shapes in enumerate(groups):
        parts = [optimizer["single_partition_of_fp32_groups"][number] for optimizer in optimizers]
        start = 0
        for place, (name, shape) in enumerate(shapes.items()):
            found[name] = _weight(shape, [(parts, start, math.prod(shape))])
            start += math.prod(shape) + (paddings[number][place] if paddings is not None else 0)
    return found


def _of_stage_3(shapes: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]]) -> StoredWeights:
    """Every rank holds an equal part of each weight, its parts of all weights laid end to end in several pieces."""
    found, start = {}, 0
    for name, shape in shapes.items():
        count = -(-math.prod(shape) // len(optimizers))
        found[name] = _weight(shape, [(optimizer["fp32_flat_groups"], start, count) for optimizer in optimizers])
        start += count
    return found


def _weight(shape: Sequence[int], where: list[tuple[Sequence[Tensor], int, int]]) -> StoredWeight:
    """A weight that is cut out of vectors: (vectors end to end, first number, how many), one after the other."""

    def read() -> Tensor:
        pieces = [piece for parts, start, count in where for piece in _cut(parts, start, count)]
        return torch.cat([torch.empty(0), *pieces])[: math.prod(shape)].view(*shape)

    return StoredWeight(tuple(shape), torch.float32, read)


def _cut(parts: Sequence[Tensor], start: int, count: int) -> list[Tensor]:
    """Numbers start … start + count of vectors laid end to end."""
    pieces = []
    for part in parts:
        first, stop = max(start, 0), min(start + count, part.numel())
        if first < stop:
            pieces.append(part[first:stop])
        start -= part.numel()
    return pieces
