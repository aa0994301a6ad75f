"""Mixture-of-Depths: the kept tokens go through the inner block as that sub-sequence would alone; the others stay."""

from __future__ import annotations

import math

import pytest
import torch

from tests.zoo.helpers import DENSE, MOMA, build_model, layer, mod, stream, values
from zoo import TokenContext, Trace

ROWS = ("ttiit|itti", "tti|tit...", "..ii|ttiit", ".........", "i........")


def alone(context: TokenContext, kept: list[list[int]]) -> TokenContext:
    """The context of the kept columns of each row, padded on the right: positions and documents as they were."""

    def take(x: torch.Tensor, padding: int) -> torch.Tensor:
        width = max(1, max(map(len, kept)))
        return torch.tensor([x[b, row].tolist() + [padding] * (width - len(row)) for b, row in enumerate(kept)])

    return TokenContext.from_modality(
        take(context.modality, -1),
        take(context.document, -1),
        take(context.position, 0),
        key=take(context.key, 0).to(torch.int32),
        modalities=context.modalities,
        step=context.step,
        routing=context.routing,
    )


def through(
    layer: torch.nn.Module,
    x: torch.Tensor,
    context: TokenContext,
    kept: list[list[int]],
    ungated: tuple[int, ...] = (),
) -> torch.Tensor:
    """x, with the kept tokens moved by gate · (block(kept) − kept); the gate is 1 for the modalities `ungated`."""
    inner = alone(context, kept)
    sub = torch.zeros(*inner.shape, x.shape[-1], dtype=x.dtype)
    for b, row in enumerate(kept):
        sub[b, : len(row)] = x[b, row]
    delta, gate, y = layer.block(sub, inner) - sub, layer.router(x), x.clone()
    for modality in ungated:
        gate = gate.masked_fill((context.modality == modality).unsqueeze(-1), 1.0)
    for b, row in enumerate(kept):
        y[b, row] += gate[b, row] * delta[b, : len(row)]
    return y


def best(scores: torch.Tensor, context: TokenContext, capacity: float, scope: str) -> list[list[int]]:
    """Columns kept of each row: the highest scores of each scope, ties to the earlier token."""
    tokens = [(b, t) for b in range(scores.shape[0]) for t in range(scores.shape[1]) if context.modality[b, t] >= 0]
    scopes = [tokens] if scope == "microbatch" else [[p for p in tokens if p[0] == b] for b in range(scores.shape[0])]
    kept = [p for s in scopes for p in sorted(s, key=lambda p: -scores[p].item())[: math.ceil(len(s) * capacity)]]
    return [sorted(t for b, t in kept if b == row) for row in range(scores.shape[0])]


@pytest.mark.parametrize("inner", [MOMA, MOMA | {"scope": "row"}, DENSE], ids=["moma", "moma by row", "dense"])
@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("capacity", [0.125, 0.5, 1.0])
def test_kept_tokens_pass_and_the_others_stay(capacity, scope, inner):
    depth = {"type": "mod", "capacity": capacity, "scope": scope}
    model = build_model(layer(), layer(depth=depth, feedforward=inner))
    routed, context = model.layers[1], stream(*ROWS)
    x = values(context).detach()
    kept = best(routed.router(x)[..., 0], context, capacity, scope)
    y = routed(x, context)
    torch.testing.assert_close(y, through(routed, x, context, kept), rtol=0, atol=1e-13)
    skipped = torch.ones(context.shape, dtype=torch.bool)
    for b, row in enumerate(kept):
        skipped[b, row] = False
    assert torch.equal(y[skipped], x[skipped])


@pytest.mark.parametrize("scope", ["row", "microbatch"])
def test_equal_scores_keep_the_earlier_tokens(scope):
    depth = {
        "type": "mod",
        "capacity": "1/3",
        "scope": scope,
        "router": {"type": "linear", "initial_scale": 0},
    }
    routed, context = build_model(layer(depth=depth)).layers[0], stream("ttiitti", ".tii...", "....ttt")
    x = values(context).detach()
    kept = {"row": [[0, 1, 2], [1], [4]], "microbatch": [[0, 1, 2, 3, 4], [], []]}[scope]
    torch.testing.assert_close(routed(x, context), through(routed, x, context, kept), rtol=0, atol=1e-13)


def test_in_causal_mode_the_auxiliary_router_decides_and_the_main_one_weighs():
    routed, context = build_model(mod()).layers[0], stream(*ROWS, routing="causal")
    x = values(context).detach()
    yes = (routed.auxiliary(x)[..., 0] > 0) & context.valid
    kept = [row.nonzero()[:, 0].tolist() for row in yes]
    assert any(0 < len(row) < 9 for row in kept)
    torch.testing.assert_close(routed(x, context), through(routed, x, context, kept), rtol=0, atol=1e-13)


def test_nothing_kept_is_the_identity_and_still_uses_every_parameter():
    routed, context = build_model(mod()).layers[0], stream("ttii", "tt..", routing="causal")
    with torch.no_grad():
        routed.auxiliary.w_out.zero_()  # a logit of 0 says no
    x = values(context)
    y = routed(x, context)
    assert torch.equal(y, x)
    for name, parameter in routed.named_parameters():
        if not name.startswith("auxiliary") and ".auxiliary" not in name:
            (gradient,) = torch.autograd.grad(y.sum(), parameter, retain_graph=True)
            assert not gradient.any(), name


def test_staged_mode_is_mod_round_experts_which_choose_among_the_survivors():
    context = stream("ttiittiitt|iittii", "itititittttt", trace=Trace())
    routed = build_model(mod(feedforward=MOMA)).layers[0]
    routed(values(context), context)
    kept = context.trace.decisions["layers.0"].context  # the context of the survivors
    assert kept.row_counts == (8, 6)
    for m, (modality, experts) in enumerate(MOMA["experts"].items()):
        route = context.trace.decisions[f"layers.0.block.feedforward.groups.{modality}"]
        assert route.counts == (math.ceil(kept.totals[m] / experts),) * experts
        assert int(route.token.max()) < kept.totals[m] < context.totals[m]
