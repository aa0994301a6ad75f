"""State that no gradient trains: summed over micro-batches and ranks, updated once a step, left alone on a bad one."""

from __future__ import annotations

import torch

from pretrain.updates import Updates
from zoo.slots import Part


class Counter(Part):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.seen = name, []

    def update(self, statistics, step):
        self.seen.append((step, {key: value.tolist() for key, value in statistics.items()}))


def make(reduce):
    model = torch.nn.ModuleDict({"a": Counter("model.a"), "b": torch.nn.Sequential(Counter("model.b"))})
    return model["a"], model["b"][0], Updates(model, torch.device("cpu"), reduce)


def test_sums_of_a_step_reach_the_module_of_their_name_once():
    calls = []

    def two_ranks(tensor):
        calls.append(tensor.shape)
        return tensor * 2

    a, b, updates = make(two_ranks)
    for value in (1.0, 3.0):
        updates.add({"model.b": {"rows": torch.tensor([value, 0.0]), "gram": torch.full((2, 2), value)}})
        updates.add({"model.a": {"rows": torch.tensor(value)}})
    updates.apply(7, True)
    assert a.seen == [(7, {"rows": 8.0})]
    assert b.seen == [(7, {"rows": [8.0, 0.0], "gram": [[8.0, 8.0], [8.0, 8.0]]})]
    assert len(calls) == 1
    updates.apply(8, True)
    assert a.seen[1:] == [(8, {})] and len(calls) == 1, "nothing collected: no reduction, and the sums are gone"


def test_a_bad_step_leaves_no_trace():
    a, _, updates = make(lambda tensor: tensor)
    updates.add({"model.a": {"rows": torch.tensor(float("nan"))}})
    updates.apply(0, False)
    updates.add({"model.a": {"rows": torch.tensor(2.0)}})
    updates.apply(1, True)
    assert a.seen == [(1, {"rows": 2.0})]


def test_a_model_without_such_state_reduces_nothing():
    def never(tensor):
        raise AssertionError("reduced")

    updates = Updates(torch.nn.Linear(2, 2), torch.device("cpu"), never)
    updates.add({})
    updates.apply(0, True)


def test_what_is_frozen_is_not_updated():
    a, b, updates = make(lambda tensor: tensor)
    for part, trains in ((a, False), (b, True)):
        part.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=trains)
        updates.add({part.name: {"rows": torch.tensor(1.0)}})
    updates.apply(0, True)
    assert a.seen == [] and b.seen == [(0, {"rows": 1.0})]
