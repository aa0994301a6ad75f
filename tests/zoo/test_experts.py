"""What expert choice shares with token choice: shared experts, no-op experts, uneven groups, untied norms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zoo
from tests.zoo.helpers import ATTENTION, D_FF, D_MODEL, build_block, gradients, stream, values
from tests.zoo.test_moma import by_hand, moma
from tests.zoo.test_token_choice import swiglu
from zoo import ConfigError, Trace
from zoo.routing.capacity import capacity_count
from zoo.routing.statistics import Load

THREE = ("text", "image", "speech")
SOFTMAX = {"type": "linear", "activation": "softmax", "initial_scale": 1.0}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize(
    "experts",
    [
        {"text": 7, "image": 1},
        {"text": 6, "image": 2},
        {"text": 1, "image": 1},
        {"text": 4, "image": 2, "speech": 1},
        {"text": 1, "image": 5, "speech": 3},
    ],
    ids=lambda e: "".join(f"{count}{name[0]}" for name, count in e.items()),
)
def test_uneven_groups(experts, norm):
    config, groups = moma(experts)
    modalities = THREE[: len(experts)]
    context = stream(
        "ttitsi"[: 4 + len(experts) // 3 * 2] * 3, "iitttstti"[: 5 + len(experts) // 3 * 4], modalities=modalities
    )
    block, x = build_block("feedforward", config, modalities=modalities, norm=norm), values(context)
    np.testing.assert_allclose(block(x, context).detach(), by_hand(block, x, context, groups), atol=1e-13)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("kind", ["moma", "experts", "experts, untied"])
def test_shared_experts_are_added_to_every_token(kind, norm):
    if kind == "moma":
        config, groups = moma({"text": 2, "image": 3}, shared_experts=2)
    else:
        untied = {"untied_shared": True} if "untied" in kind else {}
        config = {"type": "experts", "experts": 3, "d_ff": D_FF, "shared_experts": 2} | untied
        groups = {"all": ((0, 1), 3)}
    context = stream("ttiti.", "iitttt")
    block, x = build_block("feedforward", config, norm=norm), values(context)
    if norm == "post":
        block.norm.weight.data.uniform_(0.5, 2)
    expected = by_hand(block, x, context, groups)
    for b, t in context.valid.nonzero().tolist():
        w_in, w_out = block.shared.w_in.weight.detach().numpy(), block.shared.w_out.weight.detach().numpy()
        if kind != "experts":
            w_in, w_out = (w[context.modality[b, t]] for w in (w_in, w_out))
        assert w_out.shape == (D_MODEL, 2 * D_FF)
        out = swiglu(x[b, t].detach().numpy(), w_in.T, w_out.T)
        if norm == "post":
            out = out / np.sqrt((out**2).mean() + 1e-5) * block.norm.weight.detach().numpy()
        expected[b, t] += out
    y = block(x, context)
    np.testing.assert_allclose(y.detach(), expected, atol=1e-13)
    assert not y[~context.valid].any()
    tied = {"untied_shared": False} if kind == "experts, untied" else {}
    cost, plain = (
        block.cost(64),
        build_block("feedforward", {**config, "shared_experts": 0, **tied}, norm=norm).cost(64),
    )
    assert [a - b for a, b in zip(cost.flops, plain.flops, strict=True)] == [2 * 2 * 3 * D_MODEL * D_FF] * 2
    assert [a - b for a, b in zip(cost.active, plain.active, strict=True)] == [2 * 3 * D_MODEL * D_FF] * 2


def test_nothing_to_untie():
    with pytest.raises(ConfigError, match=r"ffn\.untied_shared: there is nothing to untie; set shared_experts"):
        build_block("feedforward", {"type": "experts", "experts": 3, "d_ff": D_FF, "untied_shared": True}, name="ffn")


def test_noop_experts_under_expert_choice():
    config = {"type": "experts", "experts": 3, "d_ff": D_FF, "noop_experts": 2, "router": SOFTMAX}
    context = stream("ttitiitt", "titi....", trace=Trace())
    block, x = build_block("feedforward", config, name="f"), values(context)
    (group,) = block.groups.values()
    assert group.router.weight.shape == (5, D_MODEL) and group.auxiliary.w_out.shape[0] == 3
    rows = x.detach().numpy()[context.valid.numpy()]
    logits = np.exp(rows @ group.router.weight.detach().numpy().T)
    scores, expected = logits / logits.sum(1, keepdims=True), np.zeros_like(rows)
    for e in range(3):
        for n in np.argsort(-scores[:, e], kind="stable")[:3]:  # ⌈12 / 5⌉
            w_in, w_out = group.experts.w_in[e].detach().numpy(), group.experts.w_out[e].detach().numpy()
            expected[n] += scores[n, e] * swiglu(rows[n], w_in, w_out)
    y = block(x, context)
    np.testing.assert_allclose(y.detach()[context.valid], expected, atol=1e-13)
    found = gradients(y.square().sum(), group.router)["weight"]
    assert found[3:].abs().max() > 1e-4, "no-op experts learn, through the softmax"
    assert context.trace.statistics.loads == {"f.groups.all": Load(9, 36)}
    assert block.cost(64).flops == (pytest.approx(3 / 5 * 2 * 3 * D_MODEL * D_FF),) * 2
    assert capacity_count(12, group.chooser.capacity) == 3


def test_noop_experts_need_scores_that_compete():
    with pytest.raises(ConfigError, match=r"ffn\.router\.activation: sigmoid; a no-op expert works by drawing scores"):
        build_block("feedforward", {"type": "experts", "experts": 3, "d_ff": D_FF, "noop_experts": 1}, name="ffn")


@pytest.mark.parametrize("towers", [None, [["text", "speech"], ["image"]]])
def test_an_untied_norm_outside_the_gate_is_one_a_modality(towers):
    config, _ = moma({"text": 2, "image": 2, "speech": 1}, shared_experts=1)
    layer = {"mixer": ATTENTION, "feedforward": config, "norm": "post"}
    model = {"modalities": list(THREE), "d_model": D_MODEL, "vocab_size": 29}
    untied = {"untied_norms": True, "towers": towers}
    tied, block = (
        zoo.build("model", model | {"layers": [layer | more]}).double().layers[0].feedforward for more in ({}, untied)
    )
    group = [0, 1, 2] if towers is None else [0, 1, 0]
    assert block.norm.weight.shape == (max(group) + 1, D_MODEL) and tied.norm.weight.shape == (D_MODEL,)
    context = stream("ttissi.", "istitst", modalities=THREE)
    x = values(context)
    torch.testing.assert_close(block(x, context), tied(x, context), rtol=0, atol=1e-13)
    block.norm.weight.data.uniform_(0.5, 2)
    gain = block.norm.weight[torch.tensor(group)][context.modality.clamp_min(0)]
    torch.testing.assert_close(block(x, context), tied(x, context) * gain, rtol=0, atol=1e-13)
    only_text = stream("ttt", modalities=THREE)
    gradient = gradients(block(values(only_text), only_text).sum(), block)["norm.weight"]
    assert gradient[0].any() and not gradient[1:].any()
    assert tied.cost(9) == block.cost(9)
