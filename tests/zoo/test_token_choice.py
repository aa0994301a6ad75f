"""Token choice against a loop over tokens and experts that shares no code with it; its balancing by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.zoo.helpers import (
    ATTENTION,
    D_FF,
    MODALITIES,
    assert_derivative,
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
from zoo import ConfigError, TokenContext, Trace, build
from zoo.batch import Batch
from zoo.kernels import grouped
from zoo.recompute import Recompute

THREE = ("text", "image", "speech")


def router(**options) -> dict:
    return {"type": "token_choice", "initial_scale": 1.0, **options}


def moma(experts: dict[str, int], *, feedforward: dict | None = None, **options) -> tuple[dict, dict]:
    """Config of a block, and the groups of modalities `by_hand` is to use."""
    groups = {name: (m,) for m, name in enumerate(experts)}
    return {
        "type": "moma",
        "experts": experts,
        "d_ff": D_FF,
        "router": router(**options),
        **(feedforward or {}),
    }, groups


def all_tokens(experts: int, *, feedforward: dict | None = None, **options) -> tuple[dict, dict]:
    config = {"type": "experts", "experts": experts, "d_ff": D_FF, "router": router(**options), **(feedforward or {})}
    return config, {"all": (0, 1, 2)}


def swiglu(x: np.ndarray, w_in: np.ndarray, w_out: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ w_in, 2)
    return (gate / (1 + np.exp(-gate)) * up) @ w_out


def scores_by_hand(x: np.ndarray, weight: np.ndarray, score: str) -> np.ndarray:
    logits = weight @ x
    return 1 / (1 + np.exp(-logits)) if score == "sigmoid" else np.exp(logits) / np.exp(logits).sum()


def chosen_by_hand(scores: np.ndarray, top_k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]  # stable: ties to the lower expert


def by_hand(block, x, context: TokenContext, config: dict, groups: dict) -> tuple[np.ndarray, float]:
    """The output and the sum of the groups' balancing losses."""
    weights = {name: p.detach().numpy() for name, p in block.named_parameters()}
    options = config["router"]
    top_k, score = options.get("top_k", 2), options.get("score", "softmax")
    noop, shared = config.get("noop_experts", 0), config.get("shared_experts", 0)
    normalise = options.get("normalise", top_k > 1)
    x, modality = x.detach().numpy(), context.modality.numpy()
    y, loss = np.zeros_like(x), 0.0

    def normed(rows: np.ndarray) -> np.ndarray:
        if "norm.weight" not in weights:
            return rows
        return rows / np.sqrt((rows**2).mean() + 1e-5) * weights["norm.weight"]

    for name, members in groups.items():
        weight = weights[f"groups.{name}.router.weight"]
        outputs, experts = len(weight), len(weight) - noop
        fallen, probability, tokens = np.zeros(outputs), np.zeros(outputs), 0
        for place in np.ndindex(*modality.shape):
            if modality[place] not in members:
                continue
            scores = scores_by_hand(x[place], weight, score)
            chosen = chosen_by_hand(scores, top_k)
            total = sum(scores[e] for e in chosen) if normalise else 1.0
            for e in chosen:
                fallen[e] += 1
                if e < experts:
                    w_in, w_out = (weights[f"groups.{name}.experts.{w}"][e] for w in ("w_in", "w_out"))
                    y[place] += scores[e] / total * normed(swiglu(x[place], w_in, w_out))
            if shared:
                w_in, w_out = weights["shared.w_in.weight"], weights["shared.w_out.weight"]
                if config["type"] == "moma" and w_in.ndim == 3:
                    w_in, w_out = w_in[modality[place]], w_out[modality[place]]
                y[place] += normed(swiglu(x[place], w_in.T, w_out.T))
            probability += scores / scores.sum()
            tokens += 1
        if tokens:
            loss += outputs * (fallen / (tokens * top_k) * probability / tokens).sum()
    return y, loss


CASES = {
    "top-2 of 4": (all_tokens(4), ["ttitiiti", "tttt...."]),
    "top-1": (all_tokens(3, top_k=1), ["ttitiiti"]),
    "top-1, sigmoid": (all_tokens(3, top_k=1, score="sigmoid"), ["ttitiiti"]),
    "sigmoid, normalised": (all_tokens(4, top_k=3, score="sigmoid"), ["ttit"]),
    "not normalised": (all_tokens(4, normalise=False), ["ttit", "iit."]),
    "inside modalities": (moma({"text": 3, "image": 2}), ["ttiti.", "iittti"]),
    "1t1i": (moma({"text": 1, "image": 1}, top_k=1, score="sigmoid"), ["ttiti.", "iittti"]),
    "7t1i": (moma({"text": 7, "image": 1}, top_k=1), ["ttiti.", "iittti"]),
    "three modalities": (moma({"text": 2, "image": 4, "speech": 3}), ["tissit", "sittss"]),
    "a modality absent": (moma({"text": 2, "image": 2}), ["ttt.", "tt.."]),
    "shared": (all_tokens(3, feedforward={"shared_experts": 2}), ["ttit", "iit."]),
    "shared of each modality": (moma({"text": 2, "image": 3}, feedforward={"shared_experts": 1}), ["ttit", "iit."]),
    "no-op": (all_tokens(3, feedforward={"noop_experts": 2}), ["ttitiiti", "tttt...."]),
    "no-op, top-1, sigmoid": (all_tokens(2, top_k=1, score="sigmoid", feedforward={"noop_experts": 1}), ["ttitii"]),
    "no-op and shared in modalities": (
        moma({"text": 2, "image": 2}, score="sigmoid", feedforward={"noop_experts": 1, "shared_experts": 1}),
        ["ttit", "iit."],
    ),
}


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("case", CASES)
def test_output_loss_and_gradients_are_those_of_the_loop(case, norm):
    (config, groups), rows = CASES[case]
    modalities = THREE if "speech" in groups else THREE[:2]
    context = stream(*rows, modalities=modalities, trace=Trace())
    block = build_block("feedforward", config, modalities=modalities, norm=norm)
    x = values(context)
    probe = np.random.default_rng(0).normal(size=x.shape)
    y = block(x, context)
    expected, loss = by_hand(block, x, context, config, groups)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-13)
    penalty = sum(context.trace.penalties.values())
    assert len(context.trace.penalties) == len(groups) and not context.trace.losses
    np.testing.assert_allclose(penalty.detach(), 0.01 * loss, rtol=1e-12)

    def held() -> float:  # the routes stay while a weight moves
        again = context.replace(trace=context.trace.replay())
        return float((block(x, again) * torch.from_numpy(probe)).sum())

    named = {**dict(block.named_parameters()), "x": x}
    for name, gradient in gradients((y * torch.from_numpy(probe)).sum(), block, x=x).items():
        assert gradient is not None, name
        assert_derivative(held, named[name], gradient)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_gradient_of_the_balancing_loss_is_its_finite_difference(score):
    config, groups = moma({"text": 3, "image": 4}, score=score, balance={"type": "loss", "weight": 1.0})
    context = stream("ttitiiti", "titt....", trace=Trace())
    block, x = build_block("feedforward", config), values(context)
    block(x, context)
    routers = [group.router.weight for group in block.groups.values()]
    found = torch.autograd.grad(sum(context.trace.penalties.values()), routers)

    def loss() -> float:  # the chosen experts do not change under so small a step
        return by_hand(block, x, context, config, groups)[1]

    for weight, gradient in zip(routers, found, strict=True):
        assert gradient.abs().max() > 1e-3
        assert_derivative(loss, weight, gradient)


def test_equal_scores_go_to_the_lower_expert():
    config, groups = all_tokens(4, initial_scale=0)
    context = stream("ttitiiti", trace=Trace())
    block, x = build_block("feedforward", config, name="ffn"), values(context)
    np.testing.assert_allclose(block(x, context).detach(), by_hand(block, x, context, config, groups)[0], atol=1e-13)
    assert context.trace.decisions["ffn.groups.all"].counts == (8, 8, 0, 0)


@pytest.mark.parametrize("rows", [["ttt."], ["...."]], ids=["one modality", "only padding"])
@pytest.mark.parametrize("balance", ["none", "loss", "bias"])
def test_without_tokens_every_parameter_has_a_zero_gradient(rows, balance):
    feedforward = {"shared_experts": 1, "noop_experts": 1}
    config, _ = moma({"text": 2, "image": 2}, feedforward=feedforward, balance={"type": balance})
    context = stream(*rows, trace=Trace())
    block = build_block("feedforward", config)
    loss = block(values(context), context).square().sum() + sum(context.trace.penalties.values())
    for name, gradient in gradients(loss, block).items():
        assert gradient is not None and bool(gradient.isfinite().all()), name
        if "image" in name or rows == ["...."]:
            assert not gradient.any(), name


# ------------------------------------------------------------------------------------------- no token looks at another


def layers(**options) -> list[dict]:
    mixed = moma({"text": 3, "image": 2}, feedforward={"shared_experts": 1, "noop_experts": 1}, **options)[0]
    return [
        {"mixer": ATTENTION, "feedforward": mixed},
        {"mixer": ATTENTION, "feedforward": all_tokens(3, **options)[0]},
    ]


@torch.no_grad()
def test_causal_routing_is_top_k_routing_and_decoding_is_the_whole():
    model = build_model(*layers(score="sigmoid", balance={"type": "bias"})).eval()
    assert not [name for name, _ in model.named_parameters() if "auxiliary" in name]
    context = stream("ttiit|itti", "tiiitt|tti", routing="causal")
    tokens = ids(context)
    whole = model(tokens, context)
    assert torch.equal(whole, model(tokens, context.replace(routing="topk")))
    states, parts = model.init_state(2, 10), []
    for start, stop in ((0, 3), (3, 4), (4, 8), (8, 10)):
        parts.append(model(tokens[:, start:stop], columns(context, start, stop), states))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)


def test_activation_checkpointing_changes_no_bit_and_counts_once():
    def run(checkpointing: Recompute) -> dict:
        config = layers(balance={"type": "loss"})[:1] + layers(balance={"type": "bias"}, noise="gumbel")
        model = build_model(*config, activation_checkpointing=checkpointing).float()
        context = stream(*random_rows(3, 24), trace=Trace(), step=4)
        logits = model(ids(context), context)
        loss = logits.square().mean() + sum(context.trace.penalties.values())
        grads = gradients(loss, model)
        trace = context.trace
        sums = {f"{name} {k}": v for name, s in trace.updates.items() for k, v in s.items()}
        sums["statistics"] = trace.statistics.flat()
        return {"logits": logits, "loss": loss} | grads | sums | trace.penalties

    plain = run(checkpointing=False)
    for checkpointing in (True, "selective"):
        assert_equal(run(checkpointing), plain)


# ----------------------------------------------------------------------------------------------------------- balancing


def test_a_bias_counts_for_choosing_and_not_for_weighing():
    config, _ = all_tokens(3, score="sigmoid", top_k=1, balance={"type": "bias", "rate": 0.25})
    block = build_block("feedforward", config)
    gate = block.groups["all"].router
    gate.ticks.copy_(torch.tensor([-3, 0, 2]))
    context = stream("ttitiitititt", trace=Trace())
    x = values(context)
    y, scores = block(x, context), gate(x[0])
    best = (scores + torch.tensor([-0.75, 0.0, 0.5])).argmax(-1)
    assert (best != scores.argmax(-1)).any()
    for t, e in enumerate(best.tolist()):
        w_in, w_out = block.groups["all"].experts.w_in[e], block.groups["all"].experts.w_out[e]
        out = swiglu(x[0, t].detach().numpy(), w_in.detach().numpy(), w_out.detach().numpy())
        np.testing.assert_allclose(y[0, t].detach().numpy(), float(scores[t, e].detach()) * out, atol=1e-13)


def test_biases_move_a_tick_towards_equal_load_and_survive_bf16():
    config, _ = all_tokens(4, balance={"type": "bias"})
    gate = build_block("feedforward", config).groups["all"].router.bfloat16()
    for step in range(1000):
        gate.update({"rows": torch.tensor([10.0, 2.0, 4.0, 0.0])}, step)
    gate.update({"rows": torch.tensor([0.0, 1.0, 1.0, 1.0])}, 1000)
    gate.update({}, 1001)
    assert gate.ticks.tolist() == [-999, 999, -1, 999] and gate.ticks.dtype == torch.int64
    other = build_block("feedforward", config).groups["all"].router
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.ticks, gate.ticks)


def test_the_statistics_of_two_micro_batches_are_those_of_both_together():
    config, _ = moma({"text": 3, "image": 2}, balance={"type": "bias"}, feedforward={"noop_experts": 1})
    block = build_block("feedforward", config, name="ffn")
    whole = stream("ttitiiti", "titt....", trace=Trace())
    x = values(whole)

    def sums(trace: Trace) -> dict:
        sums = {f"{name} {k}": v for name, s in trace.updates.items() for k, v in s.items()}
        return sums | {"statistics": trace.statistics.flat()}

    block(x, whole)
    added: dict = {}
    for row, drawn in enumerate(("ttitiiti", "titt....")):
        part = stream(drawn, trace=Trace())
        block(x[row : row + 1], part)
        added = {name: added.get(name, 0) + value for name, value in sums(part.trace).items()}
    assert_equal(added, sums(whole.trace))
    rows = whole.trace.updates["ffn.groups.text.router"]["rows"]
    assert rows.shape == (4,) and int(rows.sum()) == 2 * whole.totals[0]
    assert not block.eval()(x, whole.replace(trace=(quiet := Trace()))).isnan().any() and not quiet.updates


def skewed(kind: str) -> tuple[float, float]:
    """Imbalance of a router whose tokens nearly all prefer one expert, before and after 60 steps of balancing."""
    options = {"type": kind} | ({"rate": 0.02} if kind == "bias" else {"weight": 1.0} if kind == "loss" else {})
    config, _ = all_tokens(4, top_k=1, score="sigmoid", balance=options)
    block = build_block("feedforward", config, name="ffn")
    gate = block.groups["all"].router
    found = []
    for step in range(60):
        context = stream(*["t" * 32] * 4, trace=Trace(), step=step)
        x = values(context, seed=step).detach()
        x[..., 0] = 2.0
        if step == 0:
            gate.weight.data[0, 0] += 1.0
        block(x, context)
        found.append(context.trace.statistics.expert_loads["ffn.groups.all"].balance()["imbalance"])
        if kind == "bias":
            gate.update(context.trace.updates[gate.name], step)
        elif kind == "loss":
            (gradient,) = torch.autograd.grad(sum(context.trace.penalties.values()), gate.weight)
            gate.weight.data -= 0.3 * gradient
    return found[0], sum(found[-5:]) / 5


def test_balancing_evens_out_a_skewed_router():
    start, end = skewed("none")
    assert start > 2 and end > 2
    for kind in ("bias", "loss"):
        start, end = skewed(kind)
        assert start > 2 and end < 1.5, (kind, start, end)


@pytest.mark.parametrize("balance", [{"type": "loss"}, {"type": "bias", "rate": 0.01}, {"type": "none"}])
def test_a_few_steps_lower_the_loss(balance):
    model = build_model(*layers(balance=balance)).float()
    objective = build("objective", {"type": "autoregressive"})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(6):
        context = stream(*random_rows(4, 24), trace=Trace(), step=step)
        batch = Batch(ids(context), context)
        parts = objective(model, batch)
        loss = objective.combine(parts, objective.counts(batch))
        (loss + sum(context.trace.penalties.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        for module in model.modules():
            if getattr(module, "name", None) in context.trace.updates:
                module.update(context.trace.updates[module.name], step)
    assert losses[-1] < losses[0] - 0.1


# ---------------------------------------------------------------------------------------------------- cost and mistakes


@pytest.mark.parametrize("noop", [0, 1])
@pytest.mark.parametrize("shared", [0, 2])
def test_cost_counts_what_runs(noop, shared):
    config, _ = moma({"text": 4, "image": 3}, feedforward={"noop_experts": noop, "shared_experts": shared})
    cost = build_block("feedforward", config).cost(128)
    one = 3 * 8 * D_FF
    for m, experts in enumerate((4, 3)):
        used = 2 * experts / (experts + noop) * one + shared * one
        assert cost.flops[m] == pytest.approx(2 * used) and cost.router[m] == 2 * 8 * (experts + noop)
        assert cost.active[m] == pytest.approx(used + 8 * (experts + noop)) and cost.auxiliary[m] == 0
    measured = build_block("feedforward", config, name="f").cost(128, {"f.groups.text": 0.1})
    assert measured.flops[0] == pytest.approx(2 * (0.4 * one + shared * one))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (moma({"text": 2, "image": 1})[0], "ffn.router.top_k: 2 of 1 experts"),
        (all_tokens(2, feedforward={"capacity": 0.5})[0], "ffn.capacity: 0.5; under router 'token_choice'"),
        (all_tokens(2, feedforward={"scope": "row"})[0], "ffn.scope: 'row'; under router 'token_choice'"),
        (all_tokens(2, top_k=1, normalise=True)[0], "normalise: true with top_k: 1 makes every weight 1"),
        (all_tokens(2, balance={"type": "bias", "weight": 1.0})[0], "weight belongs to type: loss, not bias"),
        (all_tokens(2, balance={"type": "loss", "rate": 1.0})[0], "rate belongs to type: bias, not loss"),
    ],
)
def test_a_wrong_config_is_refused_with_the_reason(config, message):
    with pytest.raises(ConfigError) as error:
        build_block("feedforward", config, name="ffn")
    assert message in str(error.value)


# ------------------------------------------------------------------------------------- without counts on the host


@pytest.mark.parametrize("counts", [(3, 5, 0, 2), (0, 0, 4), (6,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_by_ends_is_a_product_an_expert(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """In bf16 on a GPU the counts stay on the device. A CPU has the same grouped product."""
    torch.manual_seed(0)
    shapes = (sum(counts), 16), (len(counts), 16, 48), (len(counts), 24, 16)
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    x, w_in, w_out = leaves
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    ours, theirs = grouped.swiglu_by_ends(x, ends, w_in, w_out), grouped.grouped_swiglu(x, counts, w_in, w_out)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(ours, theirs, atol=tolerance * float(theirs.abs().max()), rtol=0)
    probe = torch.randn(ours.shape).to(dtype)
    for a, b in zip(*(torch.autograd.grad(y, leaves, probe) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * max(1.0, float(b.abs().max())), rtol=0)


def test_a_layer_by_ends_is_the_layer_by_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"type": "experts", "experts": 3, "d_ff": 16, "router": {"type": "token_choice", "top_k": 2}}
    block = build("feedforward", config, d_model=16, modalities=MODALITIES, seed=0).train()
    context = stream("ttiit", "tii..")
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for by_ends in (False, True):
        monkeypatch.setattr(grouped, "takes_ends", lambda *_, by_ends=by_ends: by_ends)
        trace = Trace()
        y = block(x, context.replace(trace=trace))
        gradients = torch.autograd.grad(
            y.square().sum() + trace.penalties[block.groups["all"].router.name], [x, *block.parameters()]
        )
        loads = [int(n) for n in trace.statistics.expert_loads[block.groups["all"].name].rows]
        found.append((y, *gradients, loads))
    *ours, loads = found[1]
    assert loads == found[0][-1] and sum(loads) == 2 * 8
    for a, b in zip(ours, found[0][:-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
