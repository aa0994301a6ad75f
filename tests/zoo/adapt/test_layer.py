"""The routed layer against a definition written with loops, its gate, its auxiliary loss, and what it may be combined
with."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.adapt.families import FAMILIES, IMAGE
from tests.zoo.adapt.test_conformance import METHODS, ROWS, close, generate
from tests.zoo.helpers import assert_derivative
from zoo import UserError
from zoo.adapt import Trace, adapt, adaptation, auxiliary_loss, restore, routed_layers, routers
from zoo.routing.candidates import Candidates
from zoo.routing.scorer import Scorer

LLAVA = FAMILIES["llava"]
KEEP = 0.4


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return LLAVA.build().double()


def config(method: str = "gamma_mod", **changes: Any) -> dict[str, Any]:
    return {"layers": [1, 2], "capacity": {"type": "constant", "value": KEEP}, **METHODS[method], **changes}


def reference(model: nn.Module, inputs: dict[str, Tensor], method: str) -> Tensor:
    """Logits (1, T, V) of one row without padding, by the definition."""
    embeds = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: embeds.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    decoder, x = model.model.language_model, embeds[0]
    time = torch.arange(x.shape[1])
    cos, sin = decoder.rotary_emb(x, time[None])
    images = (inputs["input_ids"][0] == IMAGE).tolist()
    for number, layer in enumerate(decoder.layers):
        kept, gate = list(range(x.shape[1])), torch.ones(x.shape[1], dtype=x.dtype)
        if number in (1, 2):
            router = decoder.mod_router if method == "gamma_mod" else layer.mod_router
            kept = []
            group: list[int] = []
            read = layer.input_layernorm(x[0]) if method == "gamma_mod" else x[0]
            logits = F.linear(read, router.weight, router.bias)
            score = logits[:, 1] - logits[:, 0] if method == "gamma_mod" else logits[:, 0]
            for t in [*range(x.shape[1]), None]:
                if t is not None and images[t]:
                    group.append(t)
                    continue
                best = sorted(group, key=lambda i: (-float(score[i].detach()), i))
                kept += sorted(best[: math.ceil(len(group) * KEEP)])
                group = []
                kept += [] if t is None else [t]
            weights = {"gamma_mod": score.sigmoid(), "p_mod": 1 + 0.2 * score.tanh(), "videollm_mod": score.sigmoid()}
            gate = torch.where(torch.tensor(images), weights[method], gate)
        sub = x[:, kept]
        mask = torch.ones(len(kept), len(kept), dtype=torch.bool).tril()[None, None]
        attended, _ = layer.self_attn(layer.input_layernorm(sub), (cos[:, kept], sin[:, kept]), mask)
        h = sub + attended
        branch = layer.mlp(layer.post_attention_layernorm(h))
        g = gate[kept][None, :, None]
        y = sub + g * (h + branch - sub) if method == "videollm_mod" else h + g * branch
        full = x * gate[None, :, None] if method == "p_mod" and number in (1, 2) else x.clone()
        full = full.index_copy(1, torch.tensor(kept), y)
        x = full
    return model.lm_head(decoder.norm(x))


@pytest.mark.parametrize("method", METHODS)
def test_the_definition(model: nn.Module, method: str) -> None:
    adapt(model, config(method))
    inputs = LLAVA.inputs(model, [[5, 4, 3]])
    close(model(**inputs).logits, reference(model, inputs, method))


@pytest.mark.parametrize("activation", ["softmax", "tanh", "sigmoid"])
@pytest.mark.parametrize("branch", ["mlp", "block"])
def test_the_routers_gradient(model: nn.Module, activation: str, branch: str) -> None:
    """By finite differences, through the gates of kept tokens and, where symmetric, of skipped ones."""
    decoder = model.get_decoder()
    for owner in (decoder, *decoder.layers):  # the family's norms compute in fp32, too coarse for differences
        for name in [name for name, _ in owner.named_children()]:
            if name.endswith("norm"):
                setattr(owner, name, nn.RMSNorm(32, eps=1e-6, dtype=torch.float64))
    gate = {"activation": activation, "branch": branch, "symmetric": activation == "tanh"}
    adapt(model, config(gate=gate, auxiliary={"type": "none"}))
    inputs = LLAVA.inputs(model, ROWS)
    ((_, router),) = routers(model)

    def loss() -> Tensor:
        return model(**inputs).logits[:, -1].square().mean()

    (gradient,) = torch.autograd.grad(loss(), [router.weight])
    assert_derivative(lambda: float(loss()), router.weight, gradient)


def test_the_auxiliary_loss_is_part_of_the_loss_in_training(model: nn.Module) -> None:
    adapt(model, config(auxiliary={"type": "membership", "weight": 0.5}))
    inputs = LLAVA.inputs(model, ROWS)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    plain = model(**inputs, labels=labels).loss
    trace = Trace()
    loss = model.train()(**inputs, labels=labels, mod_trace=trace).loss
    expected = 0.0
    for layer in routed_layers(model):
        decision = trace.decisions[layer.routing.name]
        chosen = decision.kept.reshape(-1)[decision.candidates]
        expected += F.binary_cross_entropy(decision.logits.sigmoid(), chosen.double())
    close(auxiliary_loss(trace, adaptation(model)), expected / 2)
    close(loss - plain, expected / 2)
    assert torch.equal(model(**inputs, labels=labels).loss, loss)  # without a trace of the caller's
    assert "loss" not in model.eval()(**inputs)
    hits = trace.statistics.hits["layers.1"]
    images = int((inputs["input_ids"] == IMAGE).sum())
    assert hits.total == images and hits.chosen == sum(math.ceil(16 * KEEP) for _ in range(3))
    assert 0 <= hits.rates()["accuracy"] <= 1


class Largest(Scorer):
    """Ranks a token by its largest entry."""

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        return x.amax(-1, keepdim=True)


def test_a_routed_layer_takes_any_scorer(model: nn.Module) -> None:
    adapt(model, config(group="sample", gate={"activation": "sigmoid"}, router={"input": "residual"}))
    layer, inputs, trace, seen = routed_layers(model)[0], LLAVA.inputs(model, [ROWS[0]]), Trace(), []
    layer.mod_router = Largest()
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model(**inputs, mod_trace=trace)
    images = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    kept = images[trace.decisions[layer.routing.name].kept[0, images]]
    best = images[seen[0][0, images].amax(-1).topk(math.ceil(len(images) * KEEP)).indices]
    assert kept.tolist() == sorted(best.tolist())


def test_answers_are_routed_in_training_alone(model: nn.Module) -> None:
    inputs = LLAVA.inputs(model, [[5, 20], [5, 30]])
    labels = inputs["input_ids"].clone()
    labels[:, :-10] = -100
    adapt(model, config(candidates="image_and_answer"))
    trace = Trace()
    model.train()(**inputs, labels=labels, mod_trace=trace)
    keep = trace.decisions["layers.1"].kept
    assert keep[:, -10:].sum(1).tolist() == [4, 4], "answers of a sample compete with each other"
    assert (keep[:, :-10] & (inputs["input_ids"] == IMAGE)[:, :-10]).sum(1).tolist() == [7, 7]
    question = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert bool(keep[:, :-10][question[:, :-10]].all())
    for options in ({"labels": labels}, {"mod_answers": labels != -100}):
        trace = Trace()
        model.eval()(**inputs, **options, mod_trace=trace)
        assert bool(trace.decisions["layers.1"].kept[question].all())
    trace = Trace()
    model.train()(**inputs, mod_answers=labels != -100, mod_trace=trace)
    assert torch.equal(trace.decisions["layers.1"].kept, keep)


INFERENCE = [
    {"rule": "threshold", "threshold": 0.4},
    {"rule": "threshold", "text": "threshold", "threshold": 0.4},
    {"rule": "topk", "text": "threshold", "threshold": 0.6},
]


@pytest.mark.parametrize("tokens", ["candidates", "all"])
@pytest.mark.parametrize("inference", INFERENCE, ids=lambda rule: "-".join(map(str, rule.values())))
def test_rules_of_inference(model: nn.Module, inference: dict[str, Any], tokens: str) -> None:
    """Cached equals uncached and a batch its rows, and the rule is what it says."""
    adapt(model, config(inference=inference, gate={"activation": "softmax", "tokens": tokens}))
    inputs = LLAVA.inputs(model, ROWS)
    cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    for ours, theirs in zip(cached.logits, uncached.logits, strict=True):
        close(ours, theirs)
    for row, counts in enumerate(ROWS):
        for ours, theirs in zip(cached.logits, generate(model, LLAVA.inputs(model, [counts])).logits, strict=True):
            close(ours[row], theirs[0])
    trace = Trace()
    model(**inputs, mod_trace=trace)
    images = inputs["input_ids"] == IMAGE
    for decision in trace.decisions.values():
        p = torch.full(images.shape, math.nan, dtype=torch.float64).view(-1)
        p = p.index_copy(0, decision.candidates, decision.logits.sigmoid()).view(images.shape)
        above = p > inference["threshold"]
        text = inputs["attention_mask"].bool() & ~images
        if inference["rule"] == "threshold":
            assert torch.equal(decision.kept[images], above[images])
        else:
            assert int(decision.kept[images].sum()) == 3 * math.ceil(16 * KEEP)
        assert torch.equal(decision.kept[text], above[text] if "text" in inference else text[text])
        assert 0 < decision.kept[text].float().mean() and decision.kept[images].float().mean() < 1
    model.train()
    trace = Trace()
    model(**inputs, mod_trace=trace)
    assert int(trace.decisions["layers.1"].kept[images].sum()) == 3 * math.ceil(16 * KEEP), "training has its own rule"


def test_a_sampled_image_id_is_text(model: nn.Module) -> None:
    adapt(model, config())
    inputs = LLAVA.inputs(model, [ROWS[0]])
    cache = model(**inputs, use_cache=True).past_key_values
    slots = cache.layers[1].slots
    trace = Trace()
    ones = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.int64)
    step = {"input_ids": torch.tensor([[IMAGE]]), "attention_mask": ones, "past_key_values": cache}
    model(**step, use_cache=True, mod_trace=trace)
    assert not trace.decisions and cache.layers[1].slots == slots + 1


def test_embeddings_that_hide_what_they_are(model: nn.Module) -> None:
    """Where pictures are in them already nothing says so, and it is an error; of text alone the caller says so."""
    dense = copy.deepcopy(model)
    adapt(model, config(auxiliary={"type": "none"}))
    inputs = LLAVA.inputs(model, [ROWS[0]])
    embed, given = model.get_input_embeddings(), {}
    hook = lambda module, args, kwargs: given.update(kwargs)  # noqa: E731
    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    model(**inputs)
    handle.remove()
    merged = given["inputs_embeds"]
    for call in (
        lambda: model(inputs_embeds=merged),
        lambda: model.train()(inputs_embeds=merged),
        lambda: model.generate(inputs_embeds=merged, max_new_tokens=2),
    ):
        with pytest.raises(UserError, match="inputs_embeds without input_ids .* mod_pictures=False"):
            call()
    text = embed(torch.tensor([[3, 4, 5]]))
    assert torch.equal(model.eval()(inputs_embeds=text, mod_pictures=False).logits, dense(inputs_embeds=text).logits)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    whole = generate(model, embedded | {"inputs_embeds": embed(inputs["input_ids"])})
    assert torch.equal(whole.sequences, generate(model, inputs).sequences[:, inputs["input_ids"].shape[1] :])


def test_a_decoder_called_by_itself(model: nn.Module) -> None:
    """It would run dense: nobody has told it which tokens may be skipped."""
    adapt(model, config())
    with pytest.raises(UserError, match=r"layers\.1: this LlamaDecoderLayer is called without what the adapted model"):
        model.get_decoder()(inputs_embeds=torch.zeros(1, 3, 32, dtype=torch.float64))


def test_a_layer_refuses_a_stream_of_another_shape(model: nn.Module) -> None:
    adapt(model, config())
    (layer, *_), seen = routed_layers(model), {}
    hook = lambda module, args, kwargs: seen.update(kwargs)  # noqa: E731
    layer.register_forward_pre_hook(hook, with_kwargs=True)
    model(**LLAVA.inputs(model, [ROWS[0]]))
    with pytest.raises(UserError, match="is given hidden states of shape .*; its family cannot be adapted"):
        layer(torch.zeros(2, 1, 21, 32, dtype=torch.float64), **seen)


@pytest.mark.parametrize("name", ["llava", "chameleon", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_skips_every_token(name: str, method: str) -> None:
    """What the layer returns is of its family's kind, and cached equals uncached."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    inference = {"rule": "threshold", "text": "threshold", "threshold": 0.999}
    model = adapt(family.build(), config(method, layers=list(family.layers), inference=inference))
    with torch.no_grad():
        for _, router in routers(model):
            router.weight.zero_()
            if router.bias is not None:
                router.bias.zero_()
    trace, ids = Trace(), torch.tensor([[3, 4, 5], [6, 7, 8]])
    whole = model(input_ids=ids, attention_mask=torch.ones_like(ids), mod_trace=trace).logits
    assert not any(decision.kept.any() for decision in trace.decisions.values())
    copied = copy.deepcopy(restore(copy.deepcopy(model)))
    del copied.get_decoder().layers[family.layers[0] : family.layers[-1] + 1]
    if method != "p_mod":
        close(whole, without(copied, ids))  # as if the layers were not there
    inputs = family.inputs(model, family.rows[:2])
    cached, uncached = generate(model, inputs), generate(model, inputs, use_cache=False)
    for ours, theirs in zip(cached.logits, uncached.logits, strict=True):
        close(ours, theirs)


def without(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a model that has lost some of its layers."""
    for number, layer in enumerate(model.get_decoder().layers):
        layer.self_attn.layer_idx = number
    model.config.get_text_config().num_hidden_layers = len(model.get_decoder().layers)
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if kinds is not None:
        model.config.get_text_config().layer_types = [kinds[0], kinds[-1]]
    return model(input_ids=ids, use_cache=False).logits


def test_experts_are_not_balanced_over_tokens_that_they_never_saw() -> None:
    """The family takes one mask for all layers; without a mask its loss is of the tokens that each layer was given."""
    torch.manual_seed(0)
    family = FAMILIES["qwen3_vl_moe"]
    model = adapt(family.build(), config("p_mod", auxiliary={"type": "none"})).train()
    inputs = family.inputs(model, [[3, 5]])
    options = {"labels": inputs["input_ids"], "output_router_logits": True}
    with pytest.raises(UserError, match="output_router_logits: Qwen3VLMoe.* routed layers are given fewer"):
        model(**inputs, **options)
    del inputs["attention_mask"]
    output = model(**inputs, **options)
    tokens = [logits.shape[0] for logits in output.router_logits]
    assert tokens == [26, 17, 17, 26] and output.aux_loss > 0


def test_a_trace_of_embeddings_is_that_of_ids(model: nn.Module) -> None:
    adapt(model, config())
    inputs = LLAVA.inputs(model, ROWS)
    embedded = {name: value for name, value in inputs.items() if name != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    assert torch.equal(model(**embedded).logits, model(**inputs).logits)


def test_a_copy_shares_its_router_and_can_be_restored(model: nn.Module) -> None:
    inputs = LLAVA.inputs(model, ROWS)
    dense = model(**inputs).logits
    adapt(model, config())
    twin = copy.deepcopy(model)
    ((_, router),) = routers(twin)
    assert all(layer.router is router for layer in routed_layers(twin))
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    assert torch.equal(restore(twin)(**inputs).logits, dense)
    assert not torch.equal(model(**inputs).logits, dense), "the original is still adapted"


def test_first_weights_depend_on_seed_and_name_alone(model: nn.Module) -> None:
    def weights(seed: int, **changes: Any) -> Iterator[Tensor]:
        twin = adapt(copy.deepcopy(model), config("p_mod", **changes), seed)
        return [router.weight for _, router in routers(twin)]

    torch.manual_seed(5)
    one, again, other = weights(0), weights(0, layers=[2]), weights(1)
    assert torch.equal(one[1], again[0]) and not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])
