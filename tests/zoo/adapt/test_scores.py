"""Routers without weights: FastV against the attention maps of eager attention, random draws, and both in use."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.adapt.families import FAMILIES, set_decoder_attention
from tests.zoo.adapt.pictures import UNSAID
from tests.zoo.adapt.test_conformance import ROWS, close, generate, placeholders
from zoo import UserError
from zoo.adapt import (
    Trace,
    adapt,
    cache_report,
    decoder_flops,
    load_adapted,
    restore,
    routed_layers,
    routers,
    save_adapted,
)
from zoo.adapt.scores import Watched

LLAVA = FAMILIES["llava"]
KEEP = 0.4


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return LLAVA.build().double()


def config(kind: str, **changes: Any) -> dict[str, Any]:
    """FastV's where kind is attention: every layer from 2 on, one decision for all images of a sample."""
    router = {"type": kind, **changes.pop("router", {})}
    options = {"layers": [2, 3] if kind == "attention" else [1, 2], "group": "sample", "gate": {"activation": "none"}}
    return options | {"capacity": {"type": "constant", "value": KEEP}, "router": router} | changes


def kept(model: nn.Module, inputs: dict[str, Tensor], layer: int) -> Tensor:
    trace = Trace()
    model(**inputs, mod_trace=trace)
    return trace.decisions[f"layers.{layer}"].kept


@pytest.mark.parametrize(
    "name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "llava")]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_the_last_token_attends_to(name: str, attention: str) -> None:
    """In a padded batch too it is the best of the mean over heads in the layer before."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    model = family.build()
    inputs = family.inputs(model, family.rows)
    model.set_attn_implementation(attention)
    set_decoder_attention(model, "eager")
    maps = model(**inputs, output_attentions=True).attentions[1]
    set_decoder_attention(model, attention)
    adapt(model, config("attention", layers=[2]))
    keep = kept(model, inputs, 2)
    images = placeholders(inputs["input_ids"])
    for row in range(len(family.rows)):
        columns = images[row].nonzero()[:, 0]
        wanted = maps[row, :, -1].mean(0)[columns].topk(math.ceil(len(columns) * KEEP)).indices
        assert keep[row][columns].nonzero()[:, 0].tolist() == sorted(wanted.tolist())


def test_padding_on_the_right(model: nn.Module) -> None:
    adapt(model, config("attention"))
    inputs = LLAVA.inputs(model, ROWS)
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    turned = dict(inputs)
    for key in ("input_ids", "attention_mask"):
        turned[key] = torch.stack([row.roll(-pad) for row, pad in zip(inputs[key], pads, strict=True)])
    ours, theirs = kept(model, turned, 2), kept(model, inputs, 2)
    for row, pad in enumerate(pads):
        assert torch.equal(ours[row], theirs[row].roll(-pad))


def test_dropped_tokens_are_gone_from_there_on(model: nn.Module) -> None:
    """FastV as it is defined: from layer 2 on, the layers run on what is left."""
    streams: list[Tensor] = []
    inputs = LLAVA.inputs(model, [[5, 4, 3]])
    decoder = model.get_decoder()
    handle = decoder.layers[2].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    model(**inputs)
    handle.remove()
    adapt(model, config("attention"))
    logits, keep = model(**inputs).logits, kept(model, inputs, 2)[0]
    assert torch.equal(kept(model, inputs, 3)[0], keep)
    restore(model)
    columns = keep.nonzero()[:, 0]
    x, places = streams[0][:, columns], columns[None]
    cos, sin = decoder.rotary_emb(x, places)
    for layer in decoder.layers[2:]:
        x = layer(x, position_embeddings=(cos, sin), position_ids=None, attention_mask=None)
    close(logits[:, columns], model.lm_head(decoder.norm(x)))


@pytest.mark.parametrize("kind", ["attention", "random"])
def test_generation(model: nn.Module, kind: str) -> None:
    """A batch equals its rows and the cache shrinks; random draws are the same without a cache."""
    adapt(model, config(kind))
    inputs = LLAVA.inputs(model, ROWS)
    together = generate(model, inputs)
    for row, counts in enumerate(ROWS):
        for ours, theirs in zip(together.logits, generate(model, LLAVA.inputs(model, [counts])).logits, strict=True):
            close(ours[row], theirs[0])
    if kind == "random":
        for ours, theirs in zip(together.logits, generate(model, inputs, use_cache=False).logits, strict=True):
            close(ours, theirs)
    slots = cache_report(together.past_key_values).slots
    assert [slots[0] - slots[layer] for layer in range(4)] == [
        32 - math.ceil(32 * KEEP) if layer in config(kind)["layers"] else 0 for layer in range(4)
    ]
    options = {"num_beams": 2, "suppress_tokens": UNSAID, "max_new_tokens": 3}
    model.generate(**inputs, **options)


def test_a_prompt_in_parts_has_one_last_token(model: nn.Module) -> None:
    counts = [5, 4, 3]
    features = LLAVA.inputs.features(counts)
    parts = [
        LLAVA.inputs.part(model, counts, 0, 23, features[:1]),
        LLAVA.inputs.part(model, counts, 23, 44, features[1:]),
    ]
    adapt(model, config("attention", group="image"))
    cache = model(**parts[0], use_cache=True).past_key_values
    with pytest.raises(UserError, match="router.type: attention ranks all .* one forward"):
        model(**parts[1], past_key_values=cache, use_cache=True)
    adapt(restore(model), config("random", group="image"))
    whole = model(**LLAVA.inputs(model, [counts])).logits
    cache = model(**parts[0], use_cache=True).past_key_values
    close(model(**parts[1], past_key_values=cache, use_cache=True).logits, whole[:, 23:])


def test_random_draws(model: nn.Module) -> None:
    """A draw depends on layer, seed and place, in training on the sample too. Every place comes about equally often."""
    inputs = LLAVA.inputs(model, [[2, 3], [2, 4]])
    images = placeholders(inputs["input_ids"])
    adapt(model, config("random"))
    layers = {layer: kept(model, inputs, layer)[images].view(2, 16) for layer in (1, 2)}
    assert not torch.equal(layers[1], layers[2]) and torch.equal(layers[1][0], layers[1][1])
    assert torch.equal(kept(model, inputs, 1)[images].view(2, 16), layers[1])
    trained = kept(model.train(), inputs, 1)[images].view(2, 16)
    assert not torch.equal(trained[0], trained[1])
    assert torch.equal(kept(model, inputs, 1)[images].view(2, 16), trained)
    total, seeds = torch.zeros(16), 200
    for seed in range(seeds):
        adapt(restore(model.eval()), config("random", router={"seed": seed}))
        total += kept(model, inputs, 1)[images].view(2, 16)[0]
    share = math.ceil(16 * KEEP) / 16
    spread = (seeds * share * (1 - share)) ** 0.5
    assert float((total - seeds * share).abs().max()) < 4 * spread


@pytest.mark.parametrize("kind", ["attention", "random"])
def test_saved_loaded_copied_and_restored(model: nn.Module, kind: str, tmp_path: Any) -> None:
    inputs = LLAVA.inputs(model, ROWS)
    dense = model(**inputs).logits
    adapt(model, config(kind))
    logits = model(**inputs).logits
    assert not torch.equal(logits, dense) and not list(routers(model))
    save_adapted(model, tmp_path)
    assert torch.equal(load_adapted(tmp_path)(**inputs).logits, logits)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**inputs).logits, logits)
    assert torch.equal(restore(model)(**inputs).logits, dense)
    assert not any(isinstance(layer.self_attn.config, Watched) for layer in model.get_decoder().layers)
    assert not routed_layers(model) and torch.equal(twin(**inputs).logits, logits)
    flops = decoder_flops(twin, 40, [32])
    assert flops.router == 0 and flops.prefill < decoder_flops(twin, 40).prefill


@pytest.mark.parametrize("kind", ["attention", "random"])
def test_the_rest_of_the_model_can_be_trained(model: nn.Module, kind: str) -> None:
    adapt(model.train(), config(kind))
    inputs = LLAVA.inputs(model, ROWS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**inputs).logits[:, -1].square().mean().backward()
    assert all(p.grad is not None for p in model.get_decoder().layers.parameters())


def test_attention_that_cannot_be_watched_is_refused(model: nn.Module) -> None:
    class Other(nn.Module):
        pass

    model.get_decoder().layers[1].self_attn = Other()
    with pytest.raises(UserError, match="attention weights of LlamaDecoderLayer are not available"):
        adapt(model, config("attention"))
    with torch.device("meta"):
        gemma = FAMILIES["gemma3"].build()
    with pytest.raises(UserError, match="layer 0, before the first routed one, has a sliding window"):
        adapt(gemma, config("attention", layers=[1]))
