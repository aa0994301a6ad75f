"""The whole model: causality, packing, padding, checkpointing, micro-batches, first weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zoo
from tests.zoo.helpers import (
    ATTENTION,
    DENSE,
    MOMA,
    VOCABULARY,
    assert_equal,
    build_model,
    gradients,
    ids,
    layer,
    mod,
    random_rows,
    rows,
    stream,
    untied,
    values,
)
from zoo import TokenContext, Trace, noise
from zoo.batch import Batch
from zoo.kernels import available
from zoo.recompute import Recompute

EVERYTHING = [layer(), mod(), untied(), layer(feedforward=MOMA, norm="post"), mod(norm="post")]
EXPERTS = [layer(feedforward={"type": "experts", "experts": 3, "d_ff": 12}), mod()]


# ---------------------------------------------------------------------------------------------------------- causality


def change_after(context: TokenContext, tokens: torch.Tensor, time: int) -> tuple[torch.Tensor, TokenContext]:
    """Other tokens, of other modalities, after `time`; documents stay."""
    later = (torch.arange(context.shape[1]) > time) & context.valid
    modality = torch.where(later, 1 - context.modality, context.modality)
    return torch.where(later, (tokens + 7) % VOCABULARY, tokens), TokenContext.from_modality(
        modality, context.document, context.position, routing=context.routing
    )


def effect(model: torch.nn.Module, context: TokenContext, time: int) -> float:
    """Largest change of a logit at or before `time` when everything after it changes."""
    tokens = ids(context)
    before, after = model(tokens, context), model(*change_after(context, tokens, time))
    return float((before - after)[:, : time + 1].abs().max())


def decisive(*layers: dict) -> torch.nn.Module:
    """A model whose auxiliary routers say yes to some tokens and no to others, far from the threshold."""
    model = build_model(*layers).eval()
    for name, parameter in model.named_parameters():
        if "auxiliary" in name:
            parameter.data.mul_(3)
    return model


@torch.no_grad()
@pytest.mark.parametrize("layers", [EVERYTHING, EXPERTS], ids=["moma and mod", "experts and mod"])
def test_causal_routing_sees_nothing_that_comes_later_and_top_k_does(layers):
    model = decisive(*layers)
    context = stream("ttiitit|tiitti", "tttiiitttii|t.", "..tiittiitttii", trace=Trace(), routing="causal")
    model(ids(context), context)
    shares = context.trace.statistics.shares().values()
    assert sum(0.05 < share < 0.95 for share in shares) >= 2  # the decisions do vary
    for time in range(13):
        assert effect(model, context.replace(trace=None), time) < 1e-12, time
    top_k = context.replace(trace=None, routing="topk")
    assert max(effect(model, top_k, time) for time in range(13)) > 1e-3


# ------------------------------------------------------------------------------------------------ packing and padding


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", *available("attention")])
@pytest.mark.parametrize("layers", [EVERYTHING, EXPERTS], ids=["moma and mod", "experts and mod"])
def test_packed_documents_are_the_documents_alone(layers, kernel):
    model = build_model(*layers, kernels={"attention": kernel}).eval()
    documents = ["ttiit", "i", "tiitiit", "tt"]
    context = stream("|".join(documents), routing="causal")
    tokens = ids(context)
    packed, start = model(tokens, context), 0
    for document in documents:
        stop = start + len(document)
        alone = model(tokens[:, start:stop], stream(document, routing="causal"))
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=0, atol=1e-10)
        start = stop


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["auto", *available("attention")])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_padding_changes_nothing_and_gives_zero(routing, kernel):
    model = build_model(*EVERYTHING, kernels={"attention": kernel}).eval()
    plain = stream("ttiit|itti", "tiiitt|tti", routing=routing)
    padded = stream("ttiit|itti....", "....tiiitt|tti", ".", routing=routing)
    tokens = ids(padded)
    expected = model(torch.stack([tokens[0, :9], tokens[1, 4:]]), plain)
    logits = model(tokens, padded)
    torch.testing.assert_close(torch.stack([logits[0, :9], logits[1, 4:]]), expected, rtol=0, atol=1e-12)
    assert not logits[~padded.valid].any()


# ---------------------------------------------------------------------------------------------------------- execution


@pytest.mark.parametrize("scope", ["row", "microbatch"])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_activation_checkpointing_changes_no_bit(scope, routing):
    layers = [
        layer(feedforward=MOMA | {"scope": scope}, dropout=0.2),
        mod(
            depth={"type": "mod", "capacity": 0.3, "scope": scope},
            feedforward=MOMA | {"scope": scope},
            dropout=0.1,
        ),
        untied(dropout=0.1),
        mod(norm="post"),
    ]

    def run(checkpointing: Recompute) -> dict:
        model = build_model(*layers, activation_checkpointing=checkpointing).float()
        context = stream(*random_rows(3, 24), trace=Trace(), routing=routing, step=4)
        logits = model(ids(context), context)
        loss = logits.square().mean() + sum(total / max(1, count) for total, count in context.trace.losses.values())
        grads = gradients(loss, model)
        counts = {"statistics": context.trace.statistics.flat()}
        auxiliary = {f"loss of {name}": total for name, (total, _) in context.trace.losses.items()}
        return {"logits": logits, "loss": loss} | grads | counts | auxiliary

    plain = run(checkpointing=False)
    for checkpointing in (True, "selective"):
        assert_equal(run(checkpointing), plain)


def test_dropout_of_a_branch_is_the_noise_of_its_name_step_and_tokens():
    config = layer(feedforward=None)
    dropping = build_model(config, config | {"dropout": 0.4}).layers[1]
    context = stream("ttiit|itti", "tti", step=6)
    x = values(context)
    branch = dropping.eval()(x, context) - x
    expected = x + noise.dropout(branch, 0.4, context.key, noise.salt("layers.1.mixer", 6))
    torch.testing.assert_close(dropping.train()(x, context), expected, rtol=0, atol=1e-13)


def test_checkpointing_recomputes_only_when_training():
    model = build_model(layer(), activation_checkpointing=True).eval()
    context = stream("ttiit")
    assert torch.equal(model(ids(context), context), build_model(layer()).eval()(ids(context), context))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    "layers",
    [
        [{"mixer": ATTENTION, "feedforward": DENSE}] * 2,
        [layer(), mod(), untied(), mod(norm="post")],
        [layer(feedforward={"type": "experts", "experts": 3, "d_ff": 12, "scope": "row"})],
    ],
    ids=["dense", "moma and mod", "experts"],
)
def test_eight_rows_at_once_are_four_times_two(layers, dropout):
    model = build_model(*[one | {"dropout": dropout} for one in layers]).float()
    objective = zoo.build("objective", {"type": "autoregressive", "z_loss": 1e-3, "weights": {"image": 0.5}})
    drawn = stream(*random_rows(8, 40))
    key = torch.from_numpy(noise.token_keys(11, np.arange(800, 808), 40))  # the global rows 800 … 807
    whole = TokenContext.from_modality(drawn.modality, drawn.document, key=key, step=3)
    tokens = ids(whole)
    counts = objective.counts(Batch(tokens, whole))

    def run(size: int) -> dict:
        model.zero_grad()
        totals: dict = {}
        for start in range(0, 8, size):
            context = rows(whole, start, start + size, step=3, trace=Trace())
            parts = objective(model, Batch(tokens[start : start + size], context))
            loss = objective.combine(parts, counts)
            loss = loss + sum(total for total, _ in context.trace.losses.values()) / 320
            loss.backward()
            for name, value in {"loss": loss, **parts}.items():
                totals[name] = totals.get(name, 0) + value.detach()
        return {"losses": totals, "gradients": {name: p.grad.clone() for name, p in model.named_parameters()}}

    together, apart = run(8), run(2)
    assert_equal(apart["losses"], together["losses"], tolerance=1e-5)
    assert_equal(apart["gradients"], together["gradients"], tolerance=1e-4)


# ------------------------------------------------------------------------------------------------------ first weights


def test_first_weights_depend_on_seed_and_name_alone():
    small, large, other = (
        build_model(layer()),
        build_model(layer(), mod(), layer()),
        build_model(layer(), seed=1),
    )
    again, bigger = dict(build_model(layer()).named_parameters()), dict(large.named_parameters())
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, again[name]), name
        if not name.endswith(("o_proj.weight", "w_out")) or "auxiliary" in name:  # those shrink with the depth
            assert torch.equal(parameter, bigger[name]), name
        if "norm" not in name:
            assert not torch.equal(parameter, dict(other.named_parameters())[name]), name
    ratio = bigger["layers.0.mixer.o_proj.weight"] / again["layers.0.mixer.o_proj.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3**-0.5), rtol=1e-6, atol=0)
    first, third = (bigger[f"layers.{i}.mixer.q_proj.weight"] for i in (0, 2))
    assert not torch.equal(first, third)


def test_a_module_that_cannot_be_initialised_is_named():
    with pytest.raises(TypeError, match=r"Linear owns 'weight' but has no initialise\(name, parameter, generator\)"):
        zoo.initialise(torch.nn.Sequential(torch.nn.Linear(2, 2)), seed=0)


@pytest.mark.parametrize("modalities", [("image", "text"), ("text",), ("text", "image", "speech")])
def test_a_context_of_other_modalities_is_refused(modalities):
    """Their numbers would mean other modalities without a word."""
    context = TokenContext.from_modality(torch.zeros(1, 4, dtype=torch.int64), modalities=modalities)
    with pytest.raises(ValueError, match="the model's are text, image; build it with .*modalities=model.modalities"):
        build_model(layer())(torch.zeros(1, 4, dtype=torch.int64), context)


def test_repeats_are_layers_written_out():
    repeated = zoo.ModelConfig.parse(
        {
            "modalities": ["text", "image"],
            "d_model": 8,
            "vocab_size": 9,
            "repeat": 2,
            "layers": [layer(repeat=2), mod()],
        }
    )
    assert [index for index, _ in repeated.pattern()] == [0, 0, 1, 0, 0, 1]
    model = zoo.build("model", repeated)
    assert ["router" in dict(one.named_children()) for one in model.layers] == [False, False, True] * 2
