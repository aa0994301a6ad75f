"""MoMa and the experts baseline against a loop over tokens and experts that shares no code with them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.zoo.helpers import D_FF, assert_derivative, build_block, gradients, stream, values
from zoo import TokenContext, Trace
from zoo.routing.statistics import Load

THREE = ("text", "image", "speech")


def by_hand(block, x, context: TokenContext, groups, capacity=None, scope="microbatch") -> np.ndarray:
    """Σ over experts of sigmoid(x · w) · SwiGLU(x), token by token; `groups`: group name → (modalities, experts)."""
    weights = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x, modality = x.detach().numpy(), context.modality.numpy()
    y = np.zeros_like(x)
    for name, (members, experts) in groups.items():
        share = Fraction(str(capacity)) if capacity else Fraction(1, experts)
        tokens = [(b, t) for b in range(x.shape[0]) for t in range(x.shape[1]) if modality[b, t] in members]
        scopes = [tokens] if scope == "microbatch" else [[p for p in tokens if p[0] == b] for b in range(x.shape[0])]
        for expert in range(experts):
            router = weights[f"groups.{name}.router.weight"][expert]
            w_in = weights[f"groups.{name}.experts.w_in"][expert]
            w_out = weights[f"groups.{name}.experts.w_out"][expert]
            for competing in scopes:
                best = sorted(competing, key=lambda p: -(x[p] @ router))  # stable: ties to the earlier token
                for place in best[: -(-len(competing) * share.numerator // share.denominator)]:
                    gate, up = np.split(x[place] @ w_in, 2)
                    out = (gate / (1 + np.exp(-gate)) * up) @ w_out
                    if "norm.weight" in weights:
                        out = out / np.sqrt((out**2).mean() + 1e-5) * weights["norm.weight"]
                    y[place] += out / (1 + np.exp(-x[place] @ router))
    return y


def moma(experts: dict[str, int], **options) -> tuple[dict, dict]:
    """Config of a block, and the groups `by_hand` is to use."""
    groups = {name: ((m,), count) for m, (name, count) in enumerate(experts.items())}
    return {"type": "moma", "experts": experts, "d_ff": D_FF, **options}, groups


def all_tokens(experts: int, **options) -> tuple[dict, dict]:
    return {"type": "experts", "experts": experts, "d_ff": D_FF, **options}, {"all": ((0, 1, 2), experts)}


CASES = {
    "1t1i": (moma({"text": 1, "image": 1}), ["ttit", "iitt"]),
    "4t4i": (moma({"text": 4, "image": 4}), ["tttitiit", "ttttiiii"]),
    "3t1i, counts that do not divide": (moma({"text": 3, "image": 1}), ["ttittti", "tiittit"]),
    "three modalities": (moma({"text": 2, "image": 3, "speech": 1}), ["tiss", "sitt", "iiii"]),
    "capacity as a fraction": (moma({"text": 2, "image": 2}, capacity="1/3"), ["ttttiti", "tttitti"]),
    "capacity whose float is above the decimal": (
        moma({"text": 2, "image": 2}, capacity=0.28),
        ["tiit" * 6 + "i" * 13],
    ),
    "every expert takes everything": (moma({"text": 2, "image": 2}, capacity=1), ["ttit"]),
    "padding": (moma({"text": 2, "image": 2}), ["tti...", "..tiit", "......"]),
    "rows": (moma({"text": 2, "image": 3}, scope="row"), ["ttitt", "iiiti", "ttttt"]),
    "rows with padding": (moma({"text": 2, "image": 3}, scope="row"), ["ttitt..", ".tii...", "......."]),
    "a modality absent": (moma({"text": 2, "image": 2}), ["tttt", "ttt."]),
    "all experts": (all_tokens(3), ["ttit.", "iitt."]),
    "all experts, rows": (all_tokens(4, scope="row"), ["ttit.", "iittt"]),
}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_the_loop(case, norm):
    (config, groups), rows = CASES[case]
    modalities = THREE if "speech" in str(config["experts"]) else THREE[:2]
    context = stream(*rows, modalities=modalities)
    block = build_block("feedforward", config, modalities=modalities, norm=norm)
    x = values(context)
    probe = np.random.default_rng(0).normal(size=x.shape)

    def loop() -> np.ndarray:
        return by_hand(block, x, context, groups, config.get("capacity"), config.get("scope", "microbatch"))

    y = block(x, context)
    np.testing.assert_allclose(y.detach().numpy(), loop(), atol=1e-13)
    named = {**dict(block.named_parameters()), "x": x}
    for name, gradient in gradients((y * torch.from_numpy(probe)).sum(), block, x=x).items():
        if "auxiliary" in name:
            assert gradient is None
        else:
            assert gradient is not None, name
            assert_derivative(lambda: float((loop() * probe).sum()), named[name], gradient)


@pytest.mark.parametrize("scope", ["microbatch", "row"])
@pytest.mark.parametrize("make", [lambda s: moma({"text": 2, "image": 3}, scope=s), lambda s: all_tokens(3, scope=s)])
def test_equal_scores_go_to_the_earlier_token(make, scope):
    config, groups = make(scope)
    context = stream("ttittiti", ".iittiii", "iiiiiiit")
    block = build_block("feedforward", config | {"router": {"type": "linear", "initial_scale": 0}})
    x = values(context)
    np.testing.assert_allclose(block(x, context).detach(), by_hand(block, x, context, groups, None, scope), atol=1e-13)


@pytest.mark.parametrize("routing", ["topk", "causal"])
@pytest.mark.parametrize("rows", [["ttt."], ["...."]], ids=["one modality", "only padding"])
def test_without_tokens_every_parameter_has_a_zero_gradient(rows, routing):
    context = stream(*rows, routing=routing, trace=Trace())
    block = build_block("feedforward", moma({"text": 2, "image": 2})[0])
    loss = block(values(context), context).square().sum() + sum(total for total, _ in context.trace.losses.values())
    for name, gradient in gradients(loss, block).items():
        if routing == "causal" and "auxiliary" in name:
            continue  # it only decides there
        assert gradient is not None and bool(gradient.isfinite().all()), name
        if "image" in name or rows == ["...."]:
            assert not gradient.any(), name


def test_causal_routing_sends_a_token_where_the_auxiliary_router_says_yes_and_the_main_one_weighs():
    context = stream("ttitit", "titt..", routing="causal")
    block = build_block("feedforward", moma({"text": 2, "image": 3})[0])
    x = values(context)
    y, expected = block(x, context), torch.zeros_like(x)
    for m, group in enumerate(block.groups.values()):
        yes = (group.auxiliary(x) > 0) & (context.modality == m).unsqueeze(-1)
        for e in range(group.count):
            gate, up = (x @ group.experts.w_in[e]).chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ group.experts.w_out[e]
            expected = expected + yes[..., e, None] * group.router(x)[..., e, None] * out
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


def test_the_trace_holds_the_load_of_every_group():
    context = stream("ttittti", "tii....", trace=Trace())
    block = build_block("feedforward", moma({"text": 3, "image": 1})[0], name="ffn")
    block(values(context), context)
    assert context.trace.statistics.loads == {"ffn.groups.text": Load(6, 18), "ffn.groups.image": Load(4, 4)}
