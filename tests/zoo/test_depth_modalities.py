"""Mixture-of-Depths with a capacity for each modality: who competes, who is kept, and that shapes are static."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo.context
from tests.zoo.helpers import (
    ATTENTION,
    DENSE,
    MOMA,
    assert_derivative,
    assert_equal,
    build_model,
    gradients,
    ids,
    layer,
    random_rows,
    stream,
    untied,
    values,
)
from tests.zoo.test_depth import ROWS, through
from tests.zoo.test_model import decisive, effect
from tests.zoo.test_states import CHUNKS, decode
from tests.zoo.test_states import ROWS as DECODED
from zoo import ConfigError, Trace
from zoo.recompute import Recompute

IMAGES = {"text": 1.0, "image": 0.25}
CAPACITIES = [IMAGES, {"text": "1/2", "image": 0.25}, {"text": "1/3", "image": 1.0}, {"text": 0.125, "image": 0.5}]
TANH = {"type": "linear", "activation": "tanh", "initial_scale": 1.0}


def mod(capacity: dict = IMAGES, **changes) -> dict:
    """A layer under Mixture-of-Depths with a capacity for each modality."""
    depth = {"type": "mod", "capacity": capacity}
    return layer(depth=depth | {k: changes.pop(k) for k in ("scope", "router", "over_steps") if k in changes}) | changes


def loop(scores: np.ndarray, modality: np.ndarray, capacities: list[Fraction], scope: str) -> list[list[int]]:
    """Columns kept of each row, by loops over scopes, modalities and ranks; scores and modality (B, T)."""
    rows, columns = modality.shape
    keep = np.zeros((rows, columns), dtype=bool)
    scopes = [range(rows)] if scope == "microbatch" else [[row] for row in range(rows)]
    for m, capacity in enumerate(capacities):
        for group in scopes:
            tokens = [(b, t) for b in group for t in range(columns) if modality[b, t] == m]
            wanted = -(-len(tokens) * capacity.numerator // capacity.denominator)
            for _ in range(wanted):
                left = [place for place in tokens if not keep[place]]
                keep[max(left, key=lambda place: (scores[place], -tokens.index(place)))] = True
    return [np.flatnonzero(row).tolist() for row in keep]


# --------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize("inner", [MOMA, DENSE], ids=["moma", "dense"])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("capacity", CAPACITIES, ids=str)
def test_every_modality_is_chosen_among_its_own_tokens(capacity, scope, inner):
    routed, context = build_model(mod(capacity, scope=scope, feedforward=inner)).layers[0], stream(*ROWS)
    x = values(context).detach()
    exact = [Fraction(str(capacity[name])) for name in ("text", "image")]
    kept = loop(routed.router(x)[..., 0].detach().numpy(), context.modality.numpy(), exact, scope)
    ungated = tuple(m for m, share in enumerate(exact) if share == 1)
    y = routed(x, context)
    torch.testing.assert_close(y, through(routed, x, context, kept, ungated), rtol=0, atol=1e-13)
    for b, row in enumerate(kept):
        skipped = [t for t in range(9) if t not in row]
        assert torch.equal(y[b, skipped], x[b, skipped])
    assert routed.capacities == tuple(exact) and routed.capacity == sum(exact) / 2


def test_a_modality_at_1_never_competes_and_knows_no_gate():
    routed, context = build_model(mod()).layers[0], stream("ttttt|ttt", "tt......")
    x = values(context)
    expected = routed.block(x, context)
    for scale in (0.0, 1.0, 100.0):  # whatever the router thinks
        with torch.no_grad():
            routed.router.weight.mul_(scale)
        torch.testing.assert_close(routed(x, context), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("rows", [("ttt|tt", "t...."), ("iiii", "ii.."), ("....", "....")], ids=str)
def test_an_absent_modality_leaves_every_parameter_in_the_graph(rows, routing):
    routed, context = build_model(mod({"text": 0.5, "image": 0.25})).layers[0], stream(*rows, trace=Trace())
    y = routed(values(context), context.replace(routing=routing))
    loss = y.square().sum() + sum(total for total, _ in context.trace.losses.values())
    for name, gradient in gradients(loss, routed).items():
        expected = routing == "topk" or "auxiliary" not in name
        assert (gradient is not None) == expected, name
        assert gradient is None or gradient.isfinite().all()


def test_all_at_1_is_the_block_itself_without_a_router():
    routed, context = build_model(mod({"text": 1.0, "image": 1.0})).layers[0], stream(*ROWS)
    x = values(context)
    assert torch.equal(routed(x, context), routed.block(x, context))
    assert all(name.startswith("block.") for name, _ in routed.named_parameters())


def test_the_auxiliary_routers_learn_from_candidates_alone():
    context = stream("ttiittii", "tiii....", trace=Trace())
    routed = build_model(mod({"text": 1.0, "image": 0.5}, feedforward=DENSE)).layers[0]
    routed(values(context), context)
    assert {name: count for name, (_, count) in context.trace.losses.items()} == {"layers.0.image": 7}
    assert int(context.trace.statistics.hits["layers.0.image"].chosen) == 4  # 2 of 4 and 2 of 3
    assert context.trace.statistics.shares() == {"layers.0": 9 / 12, "layers.0.image": 4 / 7}


# ------------------------------------------------------------------------------------------------------------ shapes


def test_shapes_are_static_so_that_no_device_is_asked():
    rows = ("ttiittiittiiitti", "iiiittttiiiitttt", "tiiitttttttttttt")
    depth = {"text": 1.0, "image": 0.5}
    with torch.device("meta"):  # knows shapes and no values: asking for one is an error
        model = build_model(layer(), mod(depth), mod({"text": 0.25, "image": 0.5}, norm="post"))
        blind = build_model(mod(0.5, feedforward=DENSE), mod(0.25, feedforward=DENSE))
        asking = build_model(mod(0.5))  # its experts choose among what was kept of their modality
        batch_wide = build_model(mod(depth, scope="microbatch"))
    context = stream(*rows, trace=Trace())
    model(ids(context).to("meta"), context.to("meta"))
    inner = context.trace.decisions["layers.1"].context
    assert inner.counts == ((8, 4), (8, 4), (13, 2)) and inner.shape == (3, 15)
    one = stream(rows[0])
    batch_wide(ids(one).to("meta"), one.to("meta"))
    blind(ids(context).to("meta"), context.to("meta"))
    for asks in (asking, batch_wide):
        with pytest.raises(Exception, match="[Mm]eta|tolist"):
            asks(ids(context).to("meta"), context.to("meta"))


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("capacity", [0.5, IMAGES], ids=str)
def test_counts_are_copied_at_most_once_and_are_right(capacity, scope, routing, monkeypatch):
    routed, context = build_model(mod(capacity, scope=scope, feedforward=DENSE)).layers[0], stream(*ROWS, trace=Trace())
    copies, on_host = [], zoo.context._on_host
    monkeypatch.setattr(zoo.context, "_on_host", lambda counts: copies.append(1) or on_host(counts))
    routed(values(context), context.replace(routing=routing))
    static = routing == "topk" and scope == "row"
    assert len(copies) == (0 if static else 1)
    inner = context.trace.decisions["layers.0"].context
    assert inner.counts == on_host(zoo.context._counts(inner.modality, 2))


def test_cost_is_what_every_modality_pays():
    context = stream("ttiittiittiittii", "iiiittttiiiitttt")  # half is text in every row
    kernels = {"attention": "reference"}
    plain = build_model(layer(feedforward=DENSE), kernels=kernels).layers[0]
    routed = build_model(mod({"text": 1.0, "image": 0.25}, feedforward=DENSE), kernels=kernels).layers[0]
    cost, kept = routed.cost(16), 8 + 2
    alone = plain.cost(kept).expand(2)
    assert cost.flops == (alone.flops[0], alone.flops[1] / 4)
    assert cost.router[0] == cost.auxiliary[0] == 0 < cost.router[1] < cost.auxiliary[1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        routed(values(context).detach(), context)
    keys = 4 * ATTENTION["heads"] * 2  # scores and mixing a key; the reference computes the full square
    expected = 16 * sum(part[m] for m in (0, 1) for part in (cost.flops, cost.router, cost.auxiliary))
    assert counter.get_total_flops() == expected + 2 * kept * keys * (kept - (kept + 1) / 2)
    half = routed.cost(16, {"layers.0": 0.75, "layers.0.image": 0.5})
    assert half.flops == (plain.cost(12).flops[0], plain.cost(12).flops[0] / 2)


# ---------------------------------------------------------------------------------------------- causality, execution


BOTH = {"text": 0.5, "image": 0.3}
LAYERS = [layer(), mod({"text": 1.0, "image": 0.5}), untied(), mod(BOTH, norm="post", router=TANH)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("rows", DECODED)
def test_decoding_is_the_full_forward_where_images_alone_are_routed(rows, chunks):
    model = decisive(mod(), layer(), mod(norm="post"))
    context = stream(*DECODED[rows], routing="causal", trace=Trace())
    tokens = ids(context)
    with torch.no_grad():
        full = model(tokens, context)
        decoded = decode(model, tokens, context, CHUNKS[chunks], model.init_state(context.shape[0], 9))
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-10)
    texts = context.totals[0]
    assert context.trace.decisions["layers.0"].context.totals[0] == texts


@torch.no_grad()
def test_causal_routing_sees_nothing_that_comes_later_and_top_k_does():
    model = decisive(*LAYERS)
    context = stream("ttiitit|tiitti", "tttiiitttii|t.", "..tiittiitttii", routing="causal")
    assert max(effect(model, context, time) for time in range(13)) < 1e-12
    assert max(effect(model, context.replace(routing="topk"), time) for time in range(13)) > 1e-3


@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_activation_checkpointing_changes_no_bit(scope, routing):
    warm = {"over_steps": {"type": "warm_down", "steps": 8}, "scope": scope}
    layers = [mod(dropout=0.2, **warm), mod(BOTH, norm="post", router=TANH, scope=scope)]

    def run(checkpointing: Recompute) -> dict:
        model = build_model(*layers, activation_checkpointing=checkpointing).float()
        context = stream(*random_rows(3, 24), trace=Trace(), routing=routing, step=4)
        logits = model(ids(context), context)
        loss = logits.square().mean() + sum(total / max(1, count) for total, count in context.trace.losses.values())
        counts = {"statistics": context.trace.statistics.flat()}
        return {"logits": logits, "loss": loss} | gradients(loss, model) | counts

    plain = run(checkpointing=False)
    for checkpointing in (True, "selective"):
        assert_equal(run(checkpointing), plain)


# --------------------------------------------------------------------------------------------------------- weighting


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_gradient_of_a_tanh_router_is_a_finite_difference(norm):
    routed = build_model(mod({"text": 0.5, "image": 0.25}, router=TANH, norm=norm)).layers[0]
    context = stream("ttiit|ittii", "tttti|i....", trace=Trace())
    x = values(context)
    probe = torch.randn(x.shape, dtype=x.dtype)
    loss = (routed(x, context) * probe).sum()
    (gradient,) = torch.autograd.grad(loss, routed.router.weight)
    assert gradient.abs().max() > 1e-4

    def replayed() -> float:
        again = context.replace(trace=context.trace.replay())
        return float((routed(x, again) * probe).sum())

    assert_derivative(replayed, routed.router.weight, gradient)


def test_tanh_weights_are_around_1_and_order_tokens_as_logits_do():
    x = torch.randn(64, 8, dtype=torch.float64)
    raw, tanh = (
        build_model(mod(router={"type": "linear"} | router)).layers[0].router
        for router in ({"activation": "raw"}, {"activation": "tanh", "tanh_scale": 0.3})
    )
    torch.testing.assert_close(tanh(x), 1 + 0.3 * raw(x).tanh(), rtol=0, atol=1e-15)
    assert torch.equal(tanh(x).argsort(0), raw(x).argsort(0))
    flat = build_model(mod(router={"type": "linear", "activation": "tanh", "initial_scale": 0})).layers[0]
    context = stream("iiii")
    inner = flat.block(values(context)[:, :1], stream("i"))  # capacity 1/4: the earliest token, at weight 1
    torch.testing.assert_close(flat(values(context), context)[:, :1], inner, rtol=0, atol=1e-13)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"capacity": {"text": 1.0, "imgae": 0.5}}, "capacity.imgae: unknown modality; model.modalities are text"),
        ({"capacity": {"text": 1.0}}, "capacity: no entry for 'image'; give every modality its share, 1.0 keeps all"),
        ({"capacity": {"text": 1.0, "image": 1.5}}, "capacity.image: 1.5: must be above 0 and at most 1"),
        ({"capacity": {"text": "x", "image": 1}}, "capacity.text: 'x': must be a number or a fraction"),
        ({"capacity": 0}, "capacity: 0: must be above 0 and at most 1"),
        ({"router": {"type": "linear", "activation": "softmax"}}, "router.activation: softmax over a single output"),
        ({"router": {"type": "linear", "tanh_scale": 0.2}}, "router: tanh_scale has no meaning under activation"),
    ],
    ids=str,
)
def test_what_is_refused(depth, message):
    with pytest.raises(ConfigError) as error:
        build_model(layer(), layer(depth={"type": "mod"} | depth))
    assert str(error.value).startswith(f"model.layers[1].depth.{message}")


@pytest.mark.parametrize("name", ["token_choice", "mixer"])
def test_a_router_that_chooses_for_itself_is_refused(name):
    with pytest.raises(ConfigError, match=rf"layers\[0\].depth.router.type: '{name}' chooses by itself"):
        build_model(layer(depth={"type": "mod", "router": {"type": name}}))
