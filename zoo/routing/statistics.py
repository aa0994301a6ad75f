"""What routers report: loads of blocks and experts, and how well auxiliary routers foresee what is chosen.

All of it are counts. They are added over micro-batches with `+`, and over ranks as one flat tensor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import Tensor

Number = Tensor | float
"""A count: a tensor of one element where only the device knows it, else a number on the host."""
Record = TypeVar("Record", bound="_Counts")


@dataclasses.dataclass(frozen=True)
class _Counts:
    """Base of the records: counts that are added field by field."""

    def numbers(self) -> tuple[Number, ...]:
        """The counts, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def of(self, numbers: Sequence[Number]) -> Self:
        """A record like this one with other counts."""
        return type(self)(*numbers)

    def __add__(self, other: Self) -> Self:
        return self.of([a + b for a, b in zip(self.numbers(), other.numbers(), strict=True)])


@dataclasses.dataclass(frozen=True)
class RouterHits(_Counts):
    """An auxiliary router's predictions beside the choice itself, over pairs of a token and an expert (or a layer)."""

    total: Number
    """How many pairs there are."""
    chosen: Number
    predicted: Number
    """Pairs of which the auxiliary router said that they would be chosen."""
    true_positives: Number
    """Pairs that were both predicted and chosen."""

    def rates(self) -> dict[str, float]:
        """Accuracy, precision and recall, and the accuracy of always saying no; nothing where there are no pairs."""
        total, chosen, predicted, right = map(float, self.numbers())
        if total == 0:
            return {}
        wrong = (predicted - right) + (chosen - right)
        return {
            "accuracy": 1 - wrong / total,
            "precision": right / predicted if predicted else 1.0,
            "recall": right / chosen if chosen else 1.0,
            "always_skip": 1 - chosen / total,
        }


@dataclasses.dataclass(frozen=True)
class Load(_Counts):
    """How much of what it was offered a routed block took, in tokens or in pairs of a token and an expert."""

    taken: Number
    offered: Number

    @property
    def share(self) -> float:
        """Share of what was offered that was taken; 0 where nothing was."""
        return float(self.taken) / float(self.offered) if self.offered else 0.0


@dataclasses.dataclass(frozen=True)
class ExpertLoad(_Counts):
    """Rows of each expert of a group whose tokens choose their experts; no-op experts stand after the others."""

    rows: tuple[Number, ...]

    def numbers(self) -> tuple[Number, ...]:
        return self.rows

    def of(self, numbers: Sequence[Number]) -> ExpertLoad:
        return ExpertLoad(tuple(numbers))

    def balance(self) -> dict[str, float]:
        """How evenly the experts are used: each one's share of the rows by its number, and `imbalance`, the fullest
        expert's rows over the mean; nothing where there are no rows."""
        rows = [float(value) for value in self.rows]
        total = sum(rows)
        if not total:
            return {}
        shares = {str(expert): value / total for expert, value in enumerate(rows)}
        return shares | {"imbalance": max(rows) * len(rows) / total}


@dataclasses.dataclass(frozen=True)
class Usage(_Counts):
    """Which tokens go where in a routed block: rows of every expert, by modality; a Mixture-of-Depths layer counts the
    tokens that pass as one expert's."""

    rows: tuple[Number, ...]
    """Expert by expert, and for each of them modality by modality."""
    offered: tuple[Number, ...]
    """Tokens of each modality that came to the block."""

    def numbers(self) -> tuple[Number, ...]:
        return (*self.rows, *self.offered)

    def of(self, numbers: Sequence[Number]) -> Usage:
        return Usage(tuple(numbers[: len(self.rows)]), tuple(numbers[len(self.rows) :]))

    def summary(self, modalities: Sequence[str]) -> dict[str, float]:
        """How the block uses its experts:

        - `load/<modality>`: experts a token meets on average; under Mixture-of-Depths the share of tokens that pass;
        - `entropy`: of the experts' shares of the rows over its maximum, 1 where all are used alike; of several
          experts alone;
        - `specialisation`: mean over experts of 1 − H(p) / ln M, p the shares of the M modalities in an expert's rows
          (arXiv 2504.07951 §5); 1 where each expert has one modality. Only where several modalities come to the block.
        """
        offered = [float(count) for count in self.offered]
        width = len(offered)
        experts = [[float(n) for n in self.rows[i : i + width]] for i in range(0, len(self.rows), width)]
        totals = [sum(rows[m] for rows in experts) for m in range(width)]
        found = {f"load/{modalities[m]}": totals[m] / offered[m] for m in range(width) if offered[m]}
        used = [rows for rows in experts if sum(rows)]
        if len(experts) > 1 and used:
            found["entropy"] = _entropy([sum(rows) for rows in used]) / math.log(len(experts))
        present = sum(count > 0 for count in offered)
        if present > 1 and used:
            found["specialisation"] = sum(1 - _entropy(rows) / math.log(present) for rows in used) / len(used)
        return found


@dataclasses.dataclass
class RoutingStatistics:
    """The records of one forward, or of several added up, by the name of the block that reports."""

    hits: dict[str, RouterHits] = dataclasses.field(default_factory=dict)
    loads: dict[str, Load] = dataclasses.field(default_factory=dict)
    expert_loads: dict[str, ExpertLoad] = dataclasses.field(default_factory=dict)
    usage: dict[str, Usage] = dataclasses.field(default_factory=dict)
    """Filled by forwards with a detailed trace alone."""

    def __add__(self, other: RoutingStatistics) -> RoutingStatistics:
        return RoutingStatistics(
            _added(self.hits, other.hits),
            _added(self.loads, other.loads),
            _added(self.expert_loads, other.expert_loads),
            _added(self.usage, other.usage),
        )

    def flat(self, device: torch.device | str = "cpu") -> Tensor:
        """All counts (n,) float64, in an order that the names alone decide: to be summed over ranks that have the same
        names. `with_counts` is the way back."""
        numbers = [number for record in self._records() for number in record.numbers()]
        counts = [torch.as_tensor(number).detach().to(device, torch.float64) for number in numbers]
        return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.float64, device=device)

    def with_counts(self, flat: Tensor) -> RoutingStatistics:
        """The same records with the counts of `flat` (n,), as host numbers."""
        counts = iter(flat.tolist())

        def filled(records: Mapping[str, Record]) -> dict[str, Record]:
            return {name: record.of([next(counts) for _ in record.numbers()]) for name, record in _sorted(records)}

        return RoutingStatistics(filled(self.hits), filled(self.loads), filled(self.expert_loads), filled(self.usage))

    def all_hits(self) -> RouterHits:
        """Those of all auxiliary routers together."""
        return sum(self.hits.values(), RouterHits(0, 0, 0, 0))

    def shares(self) -> dict[str, float]:
        """Share of its tokens that each routed block took, by name, where it was offered any; for `Model.cost`."""
        return {name: load.share for name, load in self.loads.items() if load.offered}

    def _records(self) -> list[_Counts]:
        parts = (self.hits, self.loads, self.expert_loads, self.usage)
        return [record for part in parts for _, record in _sorted(part)]


def _entropy(counts: Sequence[float]) -> float:
    """In nats, of the shares that the counts stand for."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts if count)


def _sorted(records: Mapping[str, Record]) -> list[tuple[str, Record]]:
    return sorted(records.items(), key=lambda item: item[0])


def _added(ours: Mapping[str, Record], theirs: Mapping[str, Record]) -> dict[str, Record]:
    both = {name: ours[name] + record if name in ours else record for name, record in theirs.items()}
    return {**ours, **both}
