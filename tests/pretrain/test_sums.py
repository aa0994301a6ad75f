"""Counts and sums: added over micro-batches, flattened in a fixed order and put together again over ranks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pretrain.process_group import Ranks
from pretrain.sums import Counts, Sums, by_source
from zoo.batch import Batch
from zoo.context import TokenContext
from zoo.routing.statistics import ExpertLoad, Load, RouterHits, RoutingStatistics
from zoo.trace import Terms


@dataclasses.dataclass(frozen=True)
class Fruit(Counts):
    apples: int
    pears: tuple[int, ...]
    plums: int


class Twice(Ranks):
    """Two ranks that hold the same."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mul_(2)


def test_counts_become_numbers_and_counts_again() -> None:
    fruit = Fruit(1, (2, 3), 2**53 + 1)
    assert fruit.numbers() == [1, 2, 3, 2**53 + 1]
    assert fruit.of(fruit.numbers()) == fruit
    assert fruit.over(Twice(), "cpu") == Fruit(2, (4, 6), 2**54 + 2)


def sums(scale: float, image_first: bool = False) -> Sums:
    parts = {"text": torch.tensor(1.0 * scale), "image": torch.tensor(10.0 * scale)}
    hits, loads = {"b": RouterHits(4, 3, 2, 1)}, {"a": Load(1, 2)}
    routing = RoutingStatistics(hits, loads, {"c": ExpertLoad((5, 6))})
    parts = dict(reversed(parts.items())) if image_first else parts
    loss = torch.tensor(0.5 * scale, requires_grad=True)
    return Sums(loss, parts, balance=torch.tensor(0.1 * scale), routing=routing)


@pytest.mark.parametrize("image_first", [False, True])
def test_sums_over_micro_batches_and_ranks(image_first: bool) -> None:
    total = Sums() + sums(1.0) + sums(2.0, image_first)
    assert total.loss is not None and not total.loss.requires_grad
    found = total.over(Twice(), "cpu")
    assert found.parts == {"text": 6.0, "image": 60.0} and found.loss == 3.0 and found.auxiliary is None
    assert found.balance == pytest.approx(0.6)
    assert found.routing.hits == {"b": RouterHits(16, 12, 8, 4)}
    assert found.routing.loads == {"a": Load(4, 8)} and found.routing.expert_loads == {"c": ExpertLoad((20, 24))}


def test_terms_are_summed_by_the_source_of_their_row() -> None:
    modality = torch.tensor([[0, 0, 1], [0, 0, -1], [0, 1, 1]])
    batch = Batch(modality, TokenContext.from_modality(modality), sources=torch.tensor([2, 0, 2]))
    text = torch.tensor([[0.0, 3.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    image = torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    terms = {"text": Terms(text, text > 0), "image": Terms(image, image > 0), "z_loss": Terms(text, text > 0)}
    found = by_source(terms, batch, 3)
    assert found is not None and not found.requires_grad
    assert found.tolist() == [[5.0, 1.0], [0.0, 0.0], [7.0, 4.0]]
    once = Sums(sources=found)
    assert (Sums() + once + once).over(Twice(), "cpu").sources == [5.0, None, 7 / 4]
    assert by_source(terms, Batch(modality, batch.context), 3) is None and by_source(None, batch, 3) is None
    assert Sums().over(Ranks(), "cpu").sources == []


def test_nothing_sums_to_nothing() -> None:
    assert Sums().over(Ranks(), "cpu").loss is None
