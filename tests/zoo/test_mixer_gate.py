"""MixER's gate: its refit against k-means and least squares written out, its features, its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.zoo.helpers import (
    ATTENTION,
    D_FF,
    D_MODEL,
    assert_equal,
    build_block,
    build_model,
    columns,
    gradients,
    ids,
    random_rows,
    stream,
    values,
)
from zoo import ConfigError, Trace
from zoo.mixer_gate import MixerGate, PrefixState, prefix_means
from zoo.recompute import Recompute
from zoo.routing.candidates import Candidates


def experts(count: int, **options) -> dict:
    return {"type": "experts", "experts": count, "d_ff": D_FF, "router": {"type": "mixer", **options}}


def moma(**options) -> dict:
    router = {"type": "mixer", **options}
    return {"type": "moma", "experts": {"text": 3, "image": 2}, "d_ff": D_FF, "router": router}


def gates(block: torch.nn.Module) -> list[MixerGate]:
    return [module for module in block.modules() if isinstance(module, MixerGate)]


def features_by_hand(x: np.ndarray, context, members: tuple[int, ...], pooled: bool) -> np.ndarray:
    found = []
    modality, document = context.modality.numpy(), context.document.numpy()
    for b, t in np.ndindex(*modality.shape):
        if modality[b, t] in members:
            before = [s for s in range(t + 1) if document[b, s] == document[b, t] and modality[b, s] in members]
            found.append(x[b, before].mean(0) if pooled else x[b, t])
    return np.stack(found)


def run_refits(block: torch.nn.Module, steps: int, drawn: list[str], parts: int = 1) -> list[tuple]:
    """Train nothing, but refit: each step's inputs are new. Returns (x, context) of every step."""
    seen = []
    for step in range(steps):
        context = stream(*drawn, step=step)
        x = values(context, seed=step).detach()
        x[..., 0] += 3.0 * (torch.arange(x.shape[1]) % 3)  # three clumps
        sums: dict = {}
        size = len(drawn) // parts
        for first in range(0, len(drawn), size):
            part = stream(*drawn[first : first + size], step=step, trace=Trace())
            block(x[first : first + size], part)
            for name, found in part.trace.updates.items():
                for key, value in found.items():
                    sums.setdefault(name, {})[key] = sums.get(name, {}).get(key, 0) + value
        for gate in gates(block):
            gate.update(sums.get(gate.name, {}), step)
        seen.append((x, context))
    return seen


@pytest.mark.parametrize("state", [False, True])
def test_means_of_very_uneven_documents_lose_nothing(state):
    """Small numbers after a document, or after another row, of numbers 10⁹ times as large: each mean as exact as fp32
    holds it, measured by its own document."""
    context = stream("tttttttt|tttt|tttt", "tttt|tttttttttttt")
    shape, size = context.modality.shape, torch.ones(context.modality.shape)
    size[context.document == 0] = 1e6
    size[context.document > 0] = 1e-3
    x = torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(0)) * size[..., None]
    flat = x.flatten(0, 1)
    lengths = tuple(int(count) for count in context.valid.sum(1))
    candidates = Candidates(context, torch.arange(flat.shape[0]), lengths, (flat.shape[0],))
    found = prefix_means(flat, candidates, PrefixState.empty(2, D_MODEL, x.device) if state else None)
    exact = torch.from_numpy(features_by_hand(x.double().numpy(), context, (0,), pooled=True))
    error = (found.double() - exact).abs() / size.flatten()[:, None]
    assert error.max() < 1e-6, "of numbers of one size"


@pytest.mark.parametrize("pooled", [False, True])
def test_refits_are_lloyd_steps_and_ridge_regressions(pooled):
    block = build_block("feedforward", moma(refit_every=2, context="document" if pooled else "token"), name="ffn")
    first = [gate.gate.clone().double().numpy() for gate in gates(block)]
    drawn = ["ttitttiit|tti", "itt|ttiittit", "titiititi|tt."]
    seen = run_refits(block, 7, drawn)
    for m, gate in enumerate(gates(block)):
        weight, centroids, size = first[m], None, gate.outputs
        for x, context in seen[::2]:
            features = features_by_hand(x.numpy(), context, (m,), pooled)
            if centroids is None:
                nearest = (features @ weight[:, :-1].T).argmax(1)
                centroids = np.zeros((size, D_MODEL))
            else:
                nearest = ((features[:, None] - centroids) ** 2).sum(-1).argmin(1)
            onehot = np.eye(size)[nearest]
            assert (onehot.sum(0) > 0).all()  # the way of empty clusters has a test of its own
            centroids = np.stack([features[nearest == e].mean(0) for e in range(size)])
            # ridge as an ordinary least squares with rows added; the intercept has none
            n, ridge = len(features), np.sqrt(1e-3 * (features**2).mean())
            above = np.concatenate([features, np.ones((n, 1))], 1) / np.sqrt(n)
            below = np.concatenate([ridge * np.eye(D_MODEL), np.zeros((D_MODEL, 1))], 1)
            target = np.concatenate([onehot / np.sqrt(n), np.zeros((D_MODEL, size))])
            weight = np.linalg.lstsq(np.concatenate([above, below]), target, rcond=None)[0].T
            centroids = centroids.astype(np.float32).astype(np.float64)
        assert int(gate.refits) == 4
        np.testing.assert_allclose(gate.centroids, centroids, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gate.gate, weight, rtol=1e-5, atol=1e-6)


def test_a_token_goes_to_the_expert_with_the_largest_score():
    for weight in ("one", "probability"):
        block = build_block("feedforward", experts(3, weight=weight))
        run_refits(block, 1, ["ttitttiit"])
        context = stream("ttitiittt", "iit......")
        x = values(context)
        y, expected = block(x, context), torch.zeros_like(x)
        (group,) = block.groups.values()
        scores = torch.nn.functional.linear(x, group.router.gate[:, :-1].double(), group.router.gate[:, -1].double())
        for b, t in context.valid.nonzero().tolist():
            e = int(scores[b, t].argmax())
            gate, up = (x[b, t] @ group.experts.w_in[e]).chunk(2)
            out = (torch.nn.functional.silu(gate) * up) @ group.experts.w_out[e]
            expected[b, t] = out * (1 if weight == "one" else scores[b, t].softmax(0)[e])
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


def test_k_means_finds_the_clumps_and_the_gate_follows():
    block = build_block("feedforward", experts(3, refit_every=1))
    run_refits(block, 12, ["t" * 30] * 4)
    centres = sorted(gates(block)[0].centroids[:, 0].tolist())
    np.testing.assert_allclose(centres, [0, 3, 6], atol=0.6)
    context = stream("t" * 30, trace=Trace())
    x = values(context).detach()
    x[..., 0] += 3.0 * (torch.arange(30) % 3)
    block(x, context)
    assert min(context.trace.decisions["groups.all"].counts) >= 4


def test_an_empty_cluster_takes_half_of_the_fullest():
    block = build_block("feedforward", experts(3, refit_every=1))
    gate = gates(block)[0]
    one = torch.zeros(3, D_MODEL + 1)
    one[0] = 10.0
    one[2, -1] = 2.0
    gram = torch.eye(D_MODEL + 1) * 12
    gate.update({"gram": gram, "moment": one}, 0)
    centroids = gate.centroids.double()
    torch.testing.assert_close((centroids[0] + centroids[1]) / 2, torch.ones(D_MODEL, dtype=torch.float64))
    assert 0 < float((centroids[0] - centroids[1]).norm()) < 0.1
    before = gate.gate.clone()
    gate.update({"gram": torch.zeros_like(gram), "moment": torch.zeros_like(one)}, 1)  # no token anywhere
    gate.update({}, 2)
    assert int(gate.refits) == 1 and torch.equal(gate.gate, before)


def test_refits_are_reproducible_and_do_not_see_the_split_into_micro_batches():
    drawn = ["ttitttiit|tti", "itt|ttiittit", "titiititi|tt.", "tttiiiiitti"]
    again = [build_block("feedforward", moma(refit_every=1), name="ffn") for _ in range(3)]
    for block, parts in zip(again, (1, 1, 2), strict=True):
        run_refits(block, 5, drawn, parts)
    first, second, split = (dict(block.named_buffers()) for block in again)
    assert_equal(second, first)
    for ours, theirs in zip(gates(again[2]), gates(again[0]), strict=True):
        torch.testing.assert_close(ours.gate, theirs.gate, rtol=1e-5, atol=1e-6)
    assert list(split) == list(first)


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float64])
def test_the_state_survives_casts_and_the_state_dict_bit_for_bit(cast):
    block = build_block("feedforward", moma(refit_every=1), name="ffn")
    run_refits(block, 3, ["ttitttiit|tti", "itt|ttiittit"])
    kept = {name: buffer.clone() for name, buffer in block.named_buffers()}
    other = build_block("feedforward", moma(refit_every=1), name="ffn").to(cast)
    other.load_state_dict(block.to(cast).state_dict())
    assert_equal(dict(other.named_buffers()), kept)
    assert all(gate.gate.dtype == torch.float32 and int(gate.refits) == 3 for gate in gates(other))
    context = stream("ttiit")
    assert other(values(context).to(cast), context).isfinite().all()


def test_only_training_on_refit_steps_collects_and_nothing_gets_a_gradient():
    block = build_block("feedforward", experts(2, refit_every=4, weight="probability"))
    for step in range(8):
        context = stream("ttiitt", step=step, trace=Trace())
        block(values(context), context)
        assert bool(context.trace.updates) == (step % 4 == 0)
    quiet = stream("ttiitt", trace=Trace())
    x = values(quiet)
    block.eval()(x, quiet)
    assert not quiet.trace.updates and not quiet.trace.losses and not quiet.trace.penalties
    assert sorted(name for name, _ in block.named_parameters()) == [
        "groups.all.experts.w_in",
        "groups.all.experts.w_out",
    ]


@pytest.mark.parametrize("context", ["token", "document"])
def test_without_tokens_the_experts_have_zero_gradients(context):
    block = build_block("feedforward", moma(context=context, refit_every=1))
    given = stream("ttt.", trace=Trace())
    for name, gradient in gradients(block(values(given), given).square().sum(), block).items():
        assert gradient is not None and (not gradient.any() or "text" in name), name
    assert set(given.trace.updates) == {gate.name for gate in gates(block)}  # every rank reports the same names


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["token", "document"])
def test_causal_routing_is_top_k_routing_and_decoding_is_the_whole(pooling):
    layers = [{"mixer": ATTENTION, "feedforward": moma(context=pooling)}] * 2
    layers.append({"mixer": ATTENTION, "feedforward": experts(3, context=pooling), "norm": "post"})
    model = build_model(*layers).eval()
    context = stream("ttiit|itti", "tiiitt|tti", routing="causal")
    tokens = ids(context)
    whole = model(tokens, context)
    assert torch.equal(whole, model(tokens, context.replace(routing="topk")))
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 5) % 29
    torch.testing.assert_close(model(changed, context)[:, :7], whole[:, :7], rtol=0, atol=1e-12)
    states, parts = model.init_state(2, 10), []
    for start, stop in ((0, 3), (3, 4), (4, 8), (8, 10)):
        parts.append(model(tokens[:, start:stop], columns(context, start, stop), states))
        originals, states = states, [state.clone() for state in states]
        for state in originals:  # what happens to these is nothing to their clones
            state.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_no_bit_and_counts_once():
    def run(checkpointing: Recompute) -> dict:
        layers = [
            {"mixer": ATTENTION, "feedforward": moma(context=c, weight="probability")} for c in ("token", "document")
        ]
        model = build_model(*layers, activation_checkpointing=checkpointing).float()
        context = stream(*random_rows(3, 24), trace=Trace())
        loss = model(ids(context), context).square().mean()
        grads = gradients(loss, model)
        sums = {f"{name} {k}": v for name, s in context.trace.updates.items() for k, v in s.items()}
        assert len(sums) == 8
        return {"loss": loss} | grads | sums

    plain = run(checkpointing=False)
    for checkpointing in (True, "selective"):
        assert_equal(run(checkpointing), plain)


def test_a_gate_and_noop_experts_are_refused():
    with pytest.raises(ConfigError, match=r"ffn\.router\.type: 'mixer' with noop_experts: 1"):
        build_block("feedforward", experts(2) | {"noop_experts": 1}, name="ffn")
