"""Weights picked by modality: the order of rows, and linear maps and norms against a loop over tokens."""

from __future__ import annotations

import re

import pytest
import torch

import zoo
from tests.zoo.helpers import ATTENTION, DENSE, assert_equal, gradients, stream, values
from zoo import ConfigError, initialise
from zoo.layers import RMSNorm
from zoo.untied import TIED, Grouping, ModalityLinear, ModalityNorm, check_towers

THREE = ("text", "image", "speech")
ROWS = {
    "mixed": ["tiits|sit", ".ttss|it"],
    "no padding": ["tisi", "stti"],
    "a modality is missing": ["ttss|tt", "..tst.."],
    "one modality": ["sss", "s.."],
    "nothing": ["...", "..."],
}
TOWERS = {
    "one each": None,
    "text and speech share": [["text", "speech"], ["image"]],
    "all share": [["speech", "image", "text"]],
    "another order": [["speech"], ["text", "image"]],
}


@pytest.fixture(params=ROWS)
def context(request):
    return stream(*ROWS[request.param], modalities=THREE)


@pytest.fixture(params=TOWERS)
def grouping(request) -> Grouping:
    return Grouping.of(THREE, TOWERS[request.param])


def test_rows_are_sorted_by_group_in_time_order_within_each(context, grouping):
    flat = torch.arange(context.modality.numel()).view(*context.shape, 1)
    rows = grouping.split(flat, context).flatten().tolist()
    modality = context.modality.view(-1).tolist()
    expected = [
        token
        for group in range(grouping.count)
        for m in range(3)
        if grouping.group[m] == group
        for token in range(len(modality))
        if modality[token] == m
    ]
    sizes = grouping.sizes(context)
    assert sum(sizes) == len(rows) and len(sizes) == grouping.count
    if grouping.tied:  # nothing is sorted, nothing left out
        assert rows == list(range(len(modality)))
        return
    assert rows == expected
    assert [grouping.group[modality[r]] for r in rows] == [g for g, size in enumerate(sizes) for _ in range(size)]


def test_merge_undoes_split_and_padding_is_zero(context, grouping):
    x = values(context)
    there_and_back = grouping.merge(grouping.split(x, context), context)
    torch.testing.assert_close(there_and_back, x.masked_fill(~context.valid.unsqueeze(-1), 0.0), rtol=0, atol=0)
    (grad,) = torch.autograd.grad((there_and_back * 3).sum(), x)
    assert torch.equal(grad, 3.0 * context.valid.unsqueeze(-1).expand_as(x))


@pytest.mark.parametrize("tied", [TIED, Grouping.of(THREE, [list(THREE)])], ids=["tied", "all in one tower"])
def test_tied_rows_are_the_tokens_themselves(context, tied):
    """Nothing is copied, whatever stands at padding."""
    x = values(context)
    assert tied.split(x, context) is x is tied.unsort(x, context) and tied.group_of_token(context) is None
    ones = torch.ones(*context.shape, 2, 3)
    assert torch.equal(tied.merge(ones, context), context.valid[:, :, None, None].float().expand(-1, -1, 2, 3))
    assert context.padded or tied.merge(ones, context) is ones


def test_a_gain_by_the_tokens_group_is_one_by_sorted_rows(context, grouping):
    by_token, by_rows = RMSNorm(8, grouping.count), ModalityNorm(8, grouping.count)
    initialise(by_rows, 0)
    by_token, by_rows = by_token.double(), by_rows.double()
    with torch.no_grad():
        by_rows.weight += torch.randn_like(by_rows.weight)
        by_token.weight.copy_(by_rows.weight)
    x = values(context)
    y = by_token(x, grouping.group_of_token(context))
    torch.testing.assert_close(y, untied(by_rows, context, grouping, x), rtol=0, atol=1e-13)


def test_split_keeps_trailing_dimensions(context, grouping):
    x = values(context, width=6)
    wide = grouping.split(x.view(*context.shape, 2, 3), context)
    assert torch.equal(wide.flatten(-2), grouping.split(x, context))
    assert torch.equal(grouping.merge(wide, context).flatten(2), grouping.merge(wide.flatten(-2), context))


def untied(module: torch.nn.Module, context, grouping, x):
    return grouping.merge(module(grouping.split(x, context), grouping.sizes(context)), context)


@pytest.mark.parametrize(
    "make", [lambda g: ModalityLinear(8, 5, g), lambda g: ModalityNorm(8, g)], ids=["linear", "norm"]
)
def test_a_token_meets_the_weights_of_its_group(make, context, grouping):
    module = make(grouping.count)
    initialise(module, 0)
    module.double()
    with torch.no_grad():
        module.weight += torch.randn_like(module.weight)
    x, weights = (
        values(context),
        module.weight.view(grouping.count, *module.weight.shape[-2 + (make(1).weight.dim() == 1) :]),
    )
    y = untied(module, context, grouping, x)
    expected = torch.zeros_like(y) + 0 * (x.sum() + weights.sum())
    for b, t in context.valid.nonzero().tolist():
        weight = weights[grouping.group[context.modality[b, t]]]
        if isinstance(module, ModalityLinear):
            expected[b, t] = weight @ x[b, t]
        else:
            expected[b, t] = x[b, t] / (x[b, t].pow(2).mean() + module.eps).sqrt() * weight
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    ours, theirs = (gradients(out.pow(2).sum(), module, x=x) for out in (y, expected))
    assert_equal(ours, theirs, 1e-12)  # zeros, not None, where a group has no token


@pytest.mark.parametrize(
    "make", [lambda g: ModalityLinear(8, 5, g), lambda g: ModalityNorm(8, g)], ids=["linear", "norm"]
)
def test_equal_groups_are_tied(make, context):
    grouping, tied, apart = Grouping.of(THREE), make(1), make(3)
    initialise(tied, 1)
    tied, apart = tied.double(), apart.double()
    with torch.no_grad():
        apart.weight.copy_(tied.weight.expand_as(apart.weight))
    x = values(context)
    torch.testing.assert_close(
        untied(apart, context, grouping, x), untied(tied, context, grouping, x), rtol=0, atol=1e-13
    )


def test_first_weights_differ_between_groups_and_have_the_scale():
    linear = ModalityLinear(400, 300, 2, scale=0.5)
    initialise(linear, 0)
    assert not torch.equal(linear.weight[0], linear.weight[1])
    torch.testing.assert_close(linear.weight.std(dim=(1, 2)), torch.full((2,), 0.5 / 20), rtol=0.02, atol=0)


def test_cost_is_that_of_one_group():
    assert ModalityLinear(8, 5, 3).cost() == ModalityLinear(8, 5).cost()
    assert ModalityLinear(8, 5, 3).cost().flops == (80.0,)


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ([["txt"], ["image", "speech"]], r"^p: unknown modality 'txt'.*did you mean 'text'\?"),
        ([["text", "image"], ["image", "speech"]], "^p: 'image' stands in two towers"),
        ([["text"], ["image"]], "^p: speech in no tower"),
    ],
)
def test_wrong_towers_are_named(towers, message):
    with pytest.raises(ConfigError, match=message):
        check_towers(towers, THREE, "p")


SHARED = {"towers": [["text"], ["image", "speech"]]}
TIED = {
    "mixer": {"mixer": ATTENTION | SHARED},
    "feedforward": {"feedforward": DENSE | SHARED},
    "untied_norms": SHARED,
}


@pytest.mark.parametrize("part", TIED)
def test_towers_of_what_is_tied_are_refused(part):
    layer = "model.layers[0]"
    at, key = (layer, part) if part == "untied_norms" else (f"{layer}.{part}", "untied")
    config = {"modalities": list(THREE), "d_model": 8, "vocab_size": 9}
    message = re.escape(f"{at}.towers: nothing is untied, so there is nothing to share; set {at}.{key}, or remove")
    with pytest.raises(ConfigError, match="^" + message):
        zoo.build("model", config | {"layers": [{"mixer": ATTENTION, "feedforward": DENSE} | TIED[part]]})
