"""What a step counts and reports: records that are added over micro-batches and summed over ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from pretrain.process_group import Ranks
from zoo.batch import Batch
from zoo.routing.statistics import RoutingStatistics
from zoo.trace import Terms


@dataclasses.dataclass(frozen=True)
class Counts:
    """Base of what a step's batches hold, in whole numbers. The fields of a subclass are ints or tuples of ints.

    They are summed over all ranks before a step begins, and losses are normalised by the sums, so that it does not
    matter which rank or micro-batch holds which token.
    """

    def numbers(self) -> list[int]:
        """All of them, in the order of the fields."""
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return [number for value in values for number in (value if isinstance(value, tuple) else (value,))]

    def of(self, numbers: Sequence[int]) -> Self:
        """A record of the same shape with other numbers, in the order that `numbers()` has."""
        rest = iter(numbers)
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return type(self)(*(tuple(next(rest) for _ in v) if isinstance(v, tuple) else next(rest) for v in values))

    def over(self, ranks: Ranks, device: torch.device | str) -> Self:
        """The sum over all ranks; collective."""
        return self.of(ranks.sum(torch.tensor(self.numbers(), dtype=torch.int64, device=device)).tolist())


@dataclasses.dataclass(frozen=True)
class Sums:
    """What forwards report, not yet summed over ranks. Add up micro-batches with `+`, beginning with `Sums()`.

    A field that no rank has stays None; a part or a block has the same name on every rank.
    """

    loss: Tensor | None = None
    """What is minimised, without the terms below; a scalar like all of them."""
    parts: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    """The objective's losses by name, summed over tokens."""
    auxiliary: Tensor | None = None
    """Loss of the auxiliary routers."""
    balance: Tensor | None = None
    """Penalties that keep routers balanced."""
    routing: RoutingStatistics = dataclasses.field(default_factory=RoutingStatistics)
    sources: Tensor | None = None
    """(S, 2): of each source of a mixture the sum of the losses of its positions, and how many they are."""

    def __add__(self, other: Sums) -> Sums:
        parts = dict(self.parts)
        for name, value in other.parts.items():
            parts[name] = parts[name] + value.detach() if name in parts else value.detach()
        return Sums(
            _plus(self.loss, other.loss),
            parts,
            _plus(self.auxiliary, other.auxiliary),
            _plus(self.balance, other.balance),
            self.routing + other.routing,
            _plus(self.sources, other.sources),
        )

    def over(self, ranks: Ranks, device: torch.device | str) -> Totals:
        """The sum over all ranks, as numbers on the host; collective, one all-reduce on `device`."""
        flat = [value.detach().double().to(device).reshape(1) for value in self._scalars()]
        if self.sources is not None:
            flat += list(self.sources.detach().double().to(device).reshape(-1, 1))
        sums = ranks.sum(torch.cat((*flat, self.routing.flat(device))))
        numbers = iter(sums[: len(flat)].tolist())
        parts = {name: next(numbers) for name in sorted(self.parts)}
        loss, auxiliary, balance = (
            None if value is None else next(numbers) for value in (self.loss, self.auxiliary, self.balance)
        )
        pairs = [] if self.sources is None else [(next(numbers), next(numbers)) for _ in self.sources]
        sources = [total / count if count else None for total, count in pairs]
        return Totals(loss, parts, auxiliary, balance, self.routing.with_counts(sums[len(flat) :]), sources)

    def _scalars(self) -> list[Tensor]:
        """All losses there are, in an order that their names alone decide."""
        single = (self.loss, self.auxiliary, self.balance)
        return [*(self.parts[name] for name in sorted(self.parts)), *(value for value in single if value is not None)]


@dataclasses.dataclass(frozen=True)
class Totals:
    """`Sums` over the whole step and all ranks; None where nothing was reported."""

    loss: float | None
    parts: Mapping[str, float]
    auxiliary: float | None
    balance: float | None
    routing: RoutingStatistics
    sources: Sequence[float | None] = ()
    """Mean loss of the positions of each source of a mixture; None for one without rows in this step."""


def by_source(terms: Mapping[str, Terms] | None, batch: Batch, count: int) -> Tensor | None:
    """(S, 2) without a gradient: the terms of the modalities' losses in a batch, summed by the source of each row, and
    how many they are; None where they are not told, or there is one source."""
    found = [each for part, each in (terms or {}).items() if part in batch.context.modalities]
    if not found or batch.sources is None:
        return None
    losses, counted = (
        torch.stack(each).sum((0, 2)) for each in zip(*((t.losses.detach(), t.counted) for t in found), strict=True)
    )
    rows = torch.stack([losses.float(), counted.float()], 1)
    return rows.new_zeros(count, 2).index_add_(0, batch.sources, rows)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b.detach() if a is None and b is not None else a
    return a + b.detach()
