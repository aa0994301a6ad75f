"""Gathers that know their inverse: values, gradients and gradients of gradients are those of indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo.gather import by_product, exchange, pick, spread
from zoo.untied import grouped_bias


def rows(count: int, width: int = 3) -> Tensor:
    return torch.randn(count, width, dtype=torch.float64, requires_grad=True)


def maps(size: int, places: int, moved: int) -> tuple[Tensor, Tensor]:
    """`moved` of `size` rows go to as many of `places`; the others nowhere, from nowhere."""
    source, target = torch.randperm(size)[:moved], torch.randperm(places)[:moved]
    index, inverse = torch.full((places,), size), torch.full((size,), places)
    index[target], inverse[source] = source, target
    return index, inverse


@pytest.mark.parametrize(
    ("size", "places", "moved"), [(7, 7, 7), (7, 5, 5), (5, 7, 5), (6, 5, 3), (4, 3, 0), (1, 1, 1)]
)
def test_an_exchange_is_indexing(size: int, places: int, moved: int) -> None:
    index, inverse = maps(size, places, moved)
    gaps, inverse_gaps = moved < places, moved < size
    x, probe = rows(size), torch.randn(places, 3, dtype=torch.float64)

    def ours(x: Tensor) -> Tensor:
        return exchange(x, index, inverse, gaps=gaps, inverse_gaps=inverse_gaps)

    theirs = torch.cat((x, x.new_zeros(1, 3)))[index]
    assert torch.equal(ours(x), theirs)
    (gradient,) = torch.autograd.grad(ours(x), x, probe)
    assert torch.equal(gradient, torch.autograd.grad(theirs, x, probe)[0])
    assert torch.autograd.gradcheck(ours, x) and torch.autograd.gradgradcheck(ours, x)


@pytest.mark.parametrize(("size", "count"), [(7, 7), (7, 4), (3, 0)])
def test_a_pick_is_indexing(size: int, count: int) -> None:
    index, x = torch.randperm(size)[:count], rows(size)
    probe = torch.randn(count, 3, dtype=torch.float64)
    assert torch.equal(pick(x, index), x[index])
    (gradient,) = torch.autograd.grad(pick(x, index), x, probe)
    assert torch.equal(gradient, torch.autograd.grad(x[index], x, probe)[0])
    assert torch.autograd.gradcheck(lambda x: pick(x, index), x)


@pytest.mark.parametrize("move", ["exchange", "pick"])
def test_no_sort_in_the_backward_pass(move: str) -> None:
    """The gradient is made by gathers and copies alone."""
    index = torch.randperm(9)
    x = rows(9)
    y = exchange(x, index, index.argsort()) if move == "exchange" else pick(x, index)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert not any("sort" in name or "embedding" in name for name in names)


def test_a_table_is_spread_and_its_gradient_added_up() -> None:
    table, group = rows(3), torch.tensor([[0, 2, 2], [0, 0, 2]])
    probe = torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.equal(spread(table, group), table[group])
    (gradient,) = torch.autograd.grad(spread(table, group), table, probe)
    assert torch.equal(gradient, torch.autograd.grad(table[group], table, probe)[0])


def test_the_gradient_of_a_spread_table_on_a_gpu_is_a_product() -> None:
    """The form for a GPU has the shape; on a CPU its values are those of the sums."""
    table, group = (
        torch.zeros(3, 4, device="meta", requires_grad=True),
        torch.zeros(2, 5, dtype=torch.int64, device="meta"),
    )
    spread(table, group).sum().backward()
    assert table.grad is not None and table.grad.shape == (3, 4)
    group, dy = torch.tensor([[0, 2, 2], [0, 0, 2]]), torch.randn(2, 3, 4, dtype=torch.float64)
    sums = torch.stack([dy[group == g].sum(0) for g in range(3)])
    torch.testing.assert_close(by_product(dy, group, 3), sums)


@pytest.mark.parametrize("sizes", [(3, 4), (0, 7), (7, 0), (2, 0, 5)])
def test_a_bias_of_each_group(sizes: tuple[int, ...]) -> None:
    x, bias = rows(7), rows(len(sizes))
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    ours, theirs = grouped_bias(x, bias, sizes), x + bias[group]
    assert torch.equal(ours, theirs)
    probe = torch.randn(7, 3, dtype=torch.float64)
    for gradient, expected in zip(*(torch.autograd.grad(y, (x, bias), probe) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(gradient, expected)
