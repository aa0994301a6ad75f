"""Decoding with states is the full forward: every mixer, token by token, in chunks, padded, packed, under MoD and
MoMa."""

from __future__ import annotations

import pytest
import torch

from tests.zoo.helpers import (
    ATTENTION,
    DENSE,
    MOMA,
    UNTIED_ATTENTION,
    build_model,
    columns,
    ids,
    layer,
    mod,
    stream,
    untied,
)
from zoo import Trace

MAMBA = {"type": "mamba", "d_state": 3, "d_conv": 3, "dt_rank": 3}
MAMBA2 = {"type": "mamba2", "d_state": 5, "d_conv": 3, "head_dim": 1, "groups": 2}
MIXERS = {
    "attention": ATTENTION,
    "untied attention": UNTIED_ATTENTION,
    "mamba": MAMBA,
    "mixture of mamba": MAMBA | {"untied": ["in_proj", "x_proj", "dt_proj", "out_proj"]},
    "mamba2": MAMBA2,
    "mixture of mamba2": MAMBA2 | {"untied": ["in_proj", "dt_bias", "norm", "out_proj"]},
}
FEEDFORWARDS = {"dense": DENSE, "moma": MOMA}

LAYERS = {
    "attention": [layer(feedforward=DENSE)],
    "moma": [layer()],
    "mod and moma": [layer(), mod(), layer(), mod(norm="post")],
    "untied": [untied(), mod(**untied())],
    "mod first": [mod(), mod(dropout=0.5)],
}
ROWS = {
    "one document": ["ttiittiit"],
    "left padding": ["ttiittiit", "..tiitiii", "......ttt"],
    "ragged at both ends": ["ttiittiit", ".tiiti...", "t........"],
    "packed": ["tti|tti|iit", "..tii|ti|..", "t|i|t|i|t|i|t|i|t"],
}
CHUNKS = {"token by token": [1] * 9, "chunks": [4, 1, 3, 1], "at once": [9]}


def decode(model, tokens, context, chunks, states) -> torch.Tensor:
    """Logits of all columns, `chunks` of them at a time."""
    parts, start = [], 0
    for width in chunks:
        part = columns(context, start, start + width)
        parts.append(model(tokens[:, start : start + width], part, states))
        start += width
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layers", LAYERS)
def test_decoding_is_the_full_forward(layers, rows, chunks):
    model = build_model(*LAYERS[layers]).eval()
    context = stream(*ROWS[rows], routing="causal")
    tokens = ids(context)
    with torch.no_grad():
        full = model(tokens, context)
        decoded = decode(model, tokens, context, CHUNKS[chunks], model.init_state(context.shape[0], 9))
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-10)
    assert not decoded[~context.valid].any()


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("depth", ["all tokens", "mod"])
@pytest.mark.parametrize("feedforward", FEEDFORWARDS)
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_every_mixer_decodes(mixer, feedforward, depth, chunks):
    """Rows of every kind side by side; under MoD some tokens pass by the second layer."""
    plain = {"mixer": MIXERS[mixer], "feedforward": FEEDFORWARDS[feedforward]}
    second = mod(norm="post", **plain) if depth == "mod" else layer(norm="post", **plain)
    model = build_model(layer(**plain), second).eval()
    context = stream(*(row for rows in ROWS.values() for row in rows), routing="causal")
    tokens, trace = ids(context), Trace()
    full = model(tokens, context.replace(trace=trace))
    decoded = decode(model, tokens, context, CHUNKS[chunks], model.init_state(*context.shape))
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-10)
    assert full[context.valid].any(-1).all() and not decoded[~context.valid].any()
    assert depth != "mod" or 0 < trace.statistics.shares()["layers.1"] < 1


@torch.no_grad()
def test_clone_is_independent_and_reorder_moves_rows():
    model = build_model(*LAYERS["mod and moma"]).eval()
    context = stream("ttiittiit", "..tiitiii", "tititi...", routing="causal")
    tokens, order = ids(context), torch.tensor([2, 0, 0])
    full = model(tokens, context)
    states = model.init_state(3, 9)
    decode(model, tokens, context, [5], states)
    branch, other = ([state.clone() for state in states] for _ in range(2))
    for state in branch:
        state.reorder(order)

    def rest(tokens: torch.Tensor, context, states) -> torch.Tensor:
        return model(tokens[:, 5:], columns(context, 5, 9), states)

    reordered = stream("tititi...", "ttiittiit", "ttiittiit", routing="causal")
    torch.testing.assert_close(rest(tokens[order], reordered, branch), full[order][:, 5:], rtol=0, atol=1e-10)
    model(tokens[:, 5:7], columns(context, 5, 7), states)
    rest((tokens + 1) % full.shape[-1], context, other)  # another continuation, while the original is under way
    last = model(tokens[:, 7:], columns(context, 7, 9), states)
    torch.testing.assert_close(last, full[:, 7:], rtol=0, atol=1e-10)


ITEMS = {
    "one document": (["t[iii]t[ii]tt"], [1, 3, 1, 2, 2]),
    "left padding": (["t[iii]t[ii]tt", "..[ii]t[ii]t[i]"], [4, 1, 2, 2]),
    "packed": (["t|[ii]|t[ii]tt[i]", "..[ti]|[ii]|.[i]"], [1, 3, 4, 1]),
}
"""Rows with items, and chunks that hold each item whole."""


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("rows", ITEMS)
@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_decoding_items_is_the_full_forward(layers, rows, at_once):
    model = build_model(*LAYERS[layers]).eval()
    drawn, chunks = ITEMS[rows]
    context = stream(*drawn, routing="causal")
    tokens = ids(context)
    full, plain = model(tokens, context), model(tokens, stream(*drawn, routing="causal").replace(item=None))
    assert (full - plain).abs().max() > 1e-3  # items matter
    chunks = [context.shape[1]] if at_once else chunks
    decoded = decode(model, tokens, context, chunks, model.init_state(*context.shape))
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-10)


@torch.no_grad()
def test_what_was_fed_before_does_not_see_the_rest_of_its_item():
    model = build_model(layer(feedforward=DENSE)).eval()
    whole, parts = stream("t[iiii]", routing="causal"), stream("t[ii][ii]", routing="causal")
    tokens = ids(whole)
    decoded = decode(model, tokens, whole, [3, 2], model.init_state(1, 5))
    torch.testing.assert_close(decoded, model(tokens, parts), rtol=0, atol=1e-10)
    assert (decoded - model(tokens, whole)).abs().max() > 1e-3


@pytest.mark.parametrize("layers", LAYERS)
@torch.no_grad()
def test_an_item_is_computed_several_times_after_the_same_prefix(layers):
    """As diffusion sampling does: each time from a clone of the prefix's states, and the last time is kept."""
    model = build_model(*LAYERS[layers]).eval()
    context = stream("tt[iii]tt", "..[iii]t.", routing="causal")
    last = ids(context)
    states = model.init_state(*context.shape)
    parts = [model(last[:, :2], columns(context, 0, 2), states)]
    item = columns(context, 2, 5)
    for seed in (7, 8):
        model(ids(item, seed), item, [state.clone() for state in states])
    parts.append(model(last[:, 2:5], item, states))
    parts.append(model(last[:, 5:], columns(context, 5, 7), states))
    torch.testing.assert_close(torch.cat(parts, 1), model(last, context), rtol=0, atol=1e-10)
