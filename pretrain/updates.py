"""Model state that no gradient trains: renewed once per optimizer step from sums over its micro-batches and all ranks.

A part of the model (`zoo.slots.Part`) joins in by having a name and an `update(statistics, step)` of its own; it puts
sums under that name into `Trace.updates` in every training forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zoo.slots import Part


class Updates:
    """The parts of a model by name, and their sums of the step in hand.

    Args:
        model: the module that runs; buffers of its parts are what changes.
        device: on which sums are reduced.
        all_reduce_sum: sums a tensor over ranks.
    """

    def __init__(self, model: nn.Module, device: torch.device, all_reduce_sum: Callable[[Tensor], Tensor]) -> None:
        self.parts = {part.name: part for part in model.modules() if isinstance(part, Part) and part.name}
        self.device, self.all_reduce_sum = device, all_reduce_sum
        self.sums: dict[tuple[str, str], Tensor] = {}

    def add(self, statistics: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take in one micro-batch's `Trace.updates`."""
        for name, sums in statistics.items():
            for key, value in sums.items():
                value = value.to(self.device, torch.float64)
                self.sums[name, key] = self.sums[name, key] + value if (name, key) in self.sums else value

    @torch.no_grad()
    def apply(self, step: int, applied: bool) -> None:
        """End step number `step`: update every module, unless the optimizer skipped the step; collective.

        One all-reduce, and none where no module has collected anything (the same on every rank).
        """
        sums, self.sums = self.sums, {}
        if not applied or not self.parts:
            return
        statistics: dict[str, dict[str, Tensor]] = {name: {} for name in self.parts}
        if sums:
            order = sorted(sums)
            flat = self.all_reduce_sum(torch.cat([sums[key].reshape(-1) for key in order]))
            for (name, key), part in zip(order, flat.split([sums[key].numel() for key in order]), strict=True):
                statistics[name][key] = part.view(sums[name, key].shape)
        for name in sorted(self.parts):
            if not _frozen(self.parts[name]):
                self.parts[name].update(statistics[name], step)


def _frozen(part: nn.Module) -> bool:
    """It has parameters, and none of them trains: then nothing else of it changes either."""
    trains = [parameter.requires_grad for parameter in part.parameters()]
    return bool(trains) and not any(trains)
