"""Upcycling keeps the function where it can, and says what it cannot copy."""

import pytest
import torch

import zoo
from zoo import TokenContext, UserError
from zoo.modalities import Vocabulary
from zoo.routing.linear import LinearScorer
from zoo.upcycle import upcycle

MODALITIES = ["text", "image"]
ATTENTION = {"type": "attention", "heads": 2, "qk_norm": True}
DENSE = {"type": "dense", "d_ff": 24}
UNTIED = {**ATTENTION, "untied": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"]}


def moma(text: int, image: int, **options):
    return {"type": "moma", "experts": {"text": text, "image": image}, "d_ff": 24, **options}


def model(feedforward, mixer=ATTENTION, seed=0, **layer):
    config = {"modalities": MODALITIES, "d_model": 16, "vocab_size": 20, "repeat": 2}
    layers = [{"mixer": mixer, "feedforward": feedforward, **layer}]
    return zoo.build("model", {**config, "layers": layers}, seed=seed).double().eval()


def inputs():
    generator = torch.Generator().manual_seed(0)
    modality = torch.randint(0, 2, (2, 13), generator=generator)
    modality[1, 10:] = -1
    return torch.randint(0, 20, (2, 13), generator=generator), TokenContext.from_modality(modality)


def upcycled(old, new):
    result = upcycle(old.state_dict(), new)
    new.load_state_dict(result.weights)
    return result


def hold_gates(model, value):
    """Every router gives the same weight to every pair."""
    for module in model.modules():
        if isinstance(module, LinearScorer):
            module.forward = lambda x, *noise, n=module.weight.shape[0]: x.new_full((x.shape[0], n), value)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_tied_to_untied_is_the_same_function(norm):
    old = model(DENSE, norm=norm)
    new = model({**DENSE, "untied": True}, UNTIED, seed=1, norm=norm, untied_norms=True)
    upcycled(old, new)
    torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_dense_to_one_expert_a_modality_is_the_same_function_with_the_gate_at_one():
    old, new = model(DENSE), model(moma(1, 1), seed=1)
    upcycled(old, new)
    hold_gates(new, 1.0)
    torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_one_to_many_experts_is_the_same_function_at_capacity_one_with_gates_shared_out():
    old, new = model(moma(1, 1)), model(moma(4, 4, capacity=1.0), seed=1)
    upcycled(old, new)
    hold_gates(old, 0.5)
    hold_gates(new, 0.5 / 4)
    torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_one_to_many_experts_is_the_same_function_with_the_seeds_own_gates_shared_out():
    """Every expert takes every token, at the weight that the seed's router gives this token over their number."""
    old, new = model(moma(1, 1)), model(moma(4, 3, capacity=1.0), seed=1)
    upcycled(old, new)
    seeds = dict(old.named_modules())
    for name, module in new.named_modules():
        if isinstance(module, LinearScorer):
            n = module.weight.shape[0]
            module.forward = lambda x, *noise, seed=seeds[name], n=n: seed(x).expand(-1, n) / n
    torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_at_real_capacity_it_is_another_function_and_the_experts_take_different_tokens():
    old, new = model(moma(1, 1)), model(moma(4, 4), seed=1)
    result = upcycled(old, new)
    router = "layers.0.feedforward.groups.text.router.weight"
    assert router not in result.origin and torch.unique(result.weights[router], dim=0).shape[0] == 4
    tokens, context = inputs()
    trace = zoo.Trace()
    assert not torch.allclose(new(tokens, context.replace(trace=trace)), old(tokens, context))
    route = trace.decisions["layers.0.feedforward.groups.text"]
    taken = [set(part.tolist()) for part in route.token.split(route.counts)]
    assert len(set(map(frozenset, taken))) > 1


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_tied_to_untied_mamba_is_the_same_function(mixer):
    projections = ["in_proj", "out_proj", *{"mamba": ["x_proj", "dt_proj"], "mamba2": ["dt_bias", "norm"]}[mixer]]
    tied = {"type": mixer, "d_state": 4} | ({"head_dim": 8} if mixer == "mamba2" else {})
    old, new = model(DENSE, tied), model(DENSE, {**tied, "untied": projections}, seed=1)
    upcycled(old, new)
    torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_dense_to_many_experts_is_the_same_function_at_capacity_one_with_gates_that_add_up_to_one():
    old = model(DENSE)
    for feedforward in (moma(2, 2, capacity=1.0), {"type": "experts", "experts": 2, "d_ff": 24, "capacity": 1.0}):
        new = model(feedforward, seed=1)
        upcycled(old, new)
        hold_gates(new, 0.5)
        torch.testing.assert_close(new(*inputs()), old(*inputs()), rtol=0, atol=1e-12)


def test_a_block_moves_into_its_depth_router_and_routers_start_fresh():
    old, new = model(moma(1, 1)), model(moma(2, 2), seed=1, depth={"type": "mod", "capacity": 0.5})
    result = upcycled(old, new)
    assert result.origin["layers.1.block.mixer.q_proj.weight"] == "layers.1.mixer.q_proj.weight"
    fresh = set(new.state_dict()) - set(result.origin)
    assert fresh and all(".router." in name or ".auxiliary." in name for name in fresh)


def test_what_cannot_be_copied_is_named():
    with pytest.raises(UserError, match=r"layers\.0\.feedforward\.w_in\.weight.*cannot be copied"):
        upcycle(model(DENSE).state_dict(), model({**DENSE, "d_ff": 32}))
    with pytest.raises(UserError, match="has no counterpart"):
        upcycle(model(DENSE, {"type": "attention", "heads": 2}).state_dict(), model(DENSE))


@pytest.mark.parametrize("untied", [False, True])
def test_a_text_model_becomes_one_that_denoises_images(untied):
    """Its ids have other numbers there; what it says of text is what it was, and image weights begin as text's."""
    old_words, new_words = Vocabulary({"text": 9}), Vocabulary({"text": 9, "image": 1})
    layers = [{"mixer": ATTENTION, "feedforward": DENSE}] * 2
    config = {"modalities": ["text"], "d_model": 16, "vocab_size": old_words.size, "layers": layers}
    old = zoo.build("model", config, seed=1).double().eval()
    if untied:
        feedforward = {**DENSE, "untied": True}
        layers = [{"mixer": UNTIED, "feedforward": feedforward, "untied_norms": True}] * 2
    ends = {
        "stem": {"image": {"type": "noisy_vectors", "width": 3}},
        "head": {"image": {"type": "vectors", "width": 3}},
    }
    config = {"modalities": MODALITIES, "d_model": 16, "vocab_size": new_words.size, "layers": layers} | ends
    new = zoo.build("model", config, seed=2).double().eval()
    before = {name: value.clone() for name, value in new.state_dict().items()}
    ids = torch.from_numpy(new_words.ids_in(old_words))
    assert ids.tolist() == [0, 1, -1, -1, *range(2, 11), -1]
    result = upcycle(old.state_dict(), new, ids)
    new.load_state_dict(result.weights)
    fresh = {name for name in result.weights if name not in result.origin}
    assert fresh == {"stems.image.weight", "stems.image.time", "heads.image.weight"}
    assert all(torch.equal(result.weights[name], before[name]) for name in fresh)
    assert torch.equal(result.weights["embedding.weight"][ids < 0], before["embedding.weight"][ids < 0])
    if untied:
        text, image = new.layers[0].mixer.q_proj.weight
        assert torch.equal(text, image) and torch.equal(text, old.layers[0].mixer.q_proj.weight)

    known = (ids >= 0).nonzero()[:, 0]
    tokens = known[torch.randint(len(known), (2, 12), generator=torch.Generator().manual_seed(0))]
    text = torch.zeros_like(tokens)
    said = new(tokens, TokenContext.from_modality(text))[..., known]
    expected = old(ids[tokens], TokenContext.from_modality(text, modalities=("text",)))[..., ids[known]]
    torch.testing.assert_close(said, expected, rtol=0, atol=1e-12)
