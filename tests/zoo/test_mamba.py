"""Mamba-1 and what both Mambas share: untying, documents, padding, decoding, Mixture-of-Depths around a recurrence."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.zoo.helpers import (
    D_MODEL,
    MODALITIES,
    assert_derivative,
    assert_equal,
    build_block,
    build_model,
    columns,
    gradients,
    ids,
    layer,
    mod,
    stream,
    values,
)
from tests.zoo.test_states import CHUNKS, ROWS, decode
from zoo import ConfigError, TokenContext
from zoo.kernels import OPERATIONS, cpu
from zoo.states import MambaState

PARTS = {"mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"], "mamba2": ["in_proj", "dt_bias", "norm", "out_proj"]}
MIXERS = {
    "mamba": {"type": "mamba", "d_state": 4},
    "mixture of mamba": {"type": "mamba", "d_state": 4, "untied": PARTS["mamba"]},
    "mamba2": {"type": "mamba2", "d_state": 4, "head_dim": 4, "groups": 2},
    "mixture of mamba2": {"type": "mamba2", "d_state": 4, "head_dim": 4, "untied": PARTS["mamba2"]},
}
PACKED = ["ttiit|iit", "..tii|t..", "ttttttttt"]


def subsets(parts: list[str]) -> list[list[str]]:
    return [list(c) for n in range(len(parts) + 1) for c in itertools.combinations(parts, n)]


def randomise(block: torch.nn.Module) -> torch.nn.Module:
    """First values at which nothing is 1 or 0 by accident."""
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block


@pytest.mark.parametrize("untied", subsets(PARTS["mamba"]), ids=lambda u: "+".join(u) or "none")
def test_untied_with_equal_groups_is_tied(untied):
    same_function("mamba", untied)


@pytest.mark.parametrize("untied", subsets(PARTS["mamba2"]), ids=lambda u: "+".join(u) or "none")
def test_untied_mamba2_with_equal_groups_is_tied(untied):
    same_function("mamba2", untied)


def same_function(kind: str, untied: list[str]) -> None:
    options = MIXERS[kind]
    tied = randomise(build_block("mixer", options))
    apart = build_block("mixer", options | {"untied": untied})
    shapes = {name: p.shape for name, p in apart.named_parameters()}
    bias = "dt_bias" if kind == "mamba2" else "dt_proj"
    for name, shape in shapes.items():
        part = name.split(".")[0]
        groups = 2 if part in untied or (part == "dt_bias" and bias in untied) else 1
        assert shape.numel() == groups * tied.state_dict()[name].numel(), name
    apart.load_state_dict(
        {
            name: value.reshape(-1).repeat(shapes[name].numel() // value.numel()).view(shapes[name])
            for name, value in tied.state_dict().items()
        }
    )
    context = stream(*PACKED)
    x = values(context)
    one, other = tied(x, context), apart(x, context)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    theirs, ours = gradients(one.pow(2).sum(), tied, x=x), gradients(other.pow(2).sum(), apart, x=x)
    summed = {
        name: g if g.numel() == theirs[name].numel() else g.view(2, *theirs[name].shape).sum(0)
        for name, g in ours.items()
    }
    assert_equal(summed, theirs, 1e-11)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_are_derivatives(name):
    block = randomise(build_block("mixer", MIXERS[name]))
    context = stream(*PACKED)
    x = values(context)
    grads = gradients(block(x, context).pow(2).sum(), block, x=x)
    for key, parameter in [*block.named_parameters(), ("x", x)]:
        assert grads[key].abs().max() > 0, key
        assert_derivative(lambda: float(block(x, context).pow(2).sum().detach()), parameter, grads[key], tolerance=1e-5)


@pytest.mark.parametrize("rows", [["tttt", "tt.."], ["....", "...."]], ids=["one modality", "nothing"])
@pytest.mark.parametrize("name", MIXERS)
def test_a_modality_without_tokens_has_zero_gradients(name, rows):
    block, context = build_block("mixer", MIXERS[name]), stream(*rows)
    x = values(context)
    y = block(x, context)
    grads = gradients(y.pow(2).sum(), block, x=x)
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    if MIXERS[name].get("untied"):
        assert not grads["in_proj.weight"][1].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MIXERS)
def test_documents_do_not_see_each_other_and_padding_is_zero(name, dtype):
    block = randomise(build_block("mixer", MIXERS[name])).to(dtype)
    context = stream("..ttiitt|iit.", "tii|t|tti....")
    x = values(context).to(dtype).detach().requires_grad_()
    y = block(x, context)
    assert not y[~context.valid].any()
    (grad,) = torch.autograd.grad(y[0, 8:].pow(2).sum(), x)
    before = float(grad[0, :8].abs().max())
    assert before <= 1e-6 * float(grad.abs().max()) if dtype == torch.float64 and "2" in name else before == 0
    other = x.detach().clone()
    other[0, 2:8] += 1  # the first document of the first row
    changed = (block(other, context) - y).abs().amax(-1) > 1e-6
    assert changed.nonzero().tolist() == [[0, t] for t in range(2, 8)]


@pytest.mark.parametrize("name", MIXERS)
def test_padding_and_neighbours_are_nobody(name):
    """A document by itself, and among others with padding before and after, gives the same."""
    block = randomise(build_block("mixer", MIXERS[name]))
    alone, among = stream("ttiitit"), stream("..ii|ttiitit|t..", "iiiii" + "." * 8)
    x = values(among)
    packed = block(x, among)[0, 4:11]
    torch.testing.assert_close(block(x[:1, 4:11], alone)[0], packed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MIXERS)
def test_the_future_changes_nothing(name):
    block, context = randomise(build_block("mixer", MIXERS[name])), stream("ttiitit")
    x = values(context)
    other = x.detach().clone()
    other[0, 4:] += 1
    changed = (block(other, context) - block(x, context)).abs().amax(-1)[0] > 1e-12
    assert changed.tolist() == [False] * 4 + [True] * 3


# ------------------------------------------------------------------------------------------------------------- decoding


def mod_and_moma(mixer: dict) -> torch.nn.Module:
    return build_model(layer(mixer=mixer), mod(mixer=mixer), mod(mixer=mixer, norm="post")).eval()


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_decoding_in_fp32_through_the_compiled_kernels(name):
    if cpu.missing():
        pytest.skip(f"no compiled kernels: {cpu.missing()}")
    model = mod_and_moma(MIXERS[name]).float()
    context = stream(*ROWS["ragged at both ends"], *ROWS["packed"], routing="causal")
    tokens = ids(context)
    full = model(tokens, context)
    decoded = decode(model, tokens, context, CHUNKS["chunks"], model.init_state(context.shape[0], 9))
    torch.testing.assert_close(decoded, full, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_clone_is_independent_and_reorder_moves_rows(name):
    model = mod_and_moma(MIXERS[name])
    context = stream("ttiittiit", "..tiitiii", "tititi...", routing="causal")
    tokens, order = ids(context), torch.tensor([2, 0, 0])
    full = model(tokens, context)
    states = model.init_state(3, 9)
    decode(model, tokens, context, [5], states)
    branch = [state.clone() for state in states]
    for state in branch:
        state.reorder(order)
    reordered = stream("tititi...", "ttiittiit", "ttiittiit", routing="causal")
    moved = model(tokens[order][:, 5:], columns(reordered, 5, 9), branch)
    torch.testing.assert_close(moved, full[order][:, 5:], rtol=0, atol=1e-10)
    torch.testing.assert_close(model(tokens[:, 5:], columns(context, 5, 9), states), full[:, 5:], rtol=0, atol=1e-10)


def test_a_row_without_a_token_keeps_its_state():
    state = MambaState.empty(2, (3, 5), (5, 4), torch.zeros((), dtype=torch.bfloat16))
    assert state.window.dtype == torch.bfloat16 and state.hidden.dtype == torch.float32
    block = build_block("mixer", MIXERS["mamba"])
    context = stream("tii", "t..")
    x = values(context)
    state = block.init_state(2, 3, x)
    block(x[:, :1], columns(context, 0, 1), state)
    before = state.clone()
    block(x[:, 1:], columns(context, 1, 3), state)
    for name in ("window", "hidden", "document"):
        ours, theirs = getattr(state, name), getattr(before, name)
        assert torch.equal(ours[1], theirs[1])
        assert name == "document" or not torch.equal(ours[0], theirs[0])


# --------------------------------------------------------------------------------------------- Mixture-of-Depths around


@pytest.mark.parametrize("name", MIXERS)
def test_mod_around_mamba_is_a_recurrence_over_the_kept_tokens(name):
    model = build_model(mod(mixer=MIXERS[name], feedforward=None)).eval()
    block, context = model.layers[0].block, stream("ttiit|iitti", "ttiittii...")
    x = values(context).detach()
    added = model.layers[0](x, context) - x
    for b in range(2):
        kept = added[b].any(-1).nonzero()[:, 0]
        assert 0 < len(kept) < context.row_counts[b]
        inner = TokenContext.from_modality(
            context.modality[b : b + 1, kept], context.document[b : b + 1, kept], context.position[b : b + 1, kept]
        )
        branch = block.mixer(block.mixer_norm(x[b : b + 1, kept]), inner)[0]
        weight = (added[b, kept] * branch).sum(-1, keepdim=True) / branch.pow(2).sum(-1, keepdim=True)  # the router's
        assert (weight > 0).all()
        torch.testing.assert_close(added[b, kept], weight * branch, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------ first values, costs, config


def test_step_sizes_start_in_their_range_and_by_group_independently():
    options = {"type": "mamba", "expand": 16, "dt_min": 1e-3, "dt_max": 0.1}
    tied, apart = (build_block("mixer", options | {"untied": u}, d_model=64) for u in ([], ["dt_proj"]))
    for block, groups in ((tied, 1), (apart, 2)):
        delta = torch.nn.functional.softplus(block.dt_bias).view(groups, -1)
        assert delta.min() >= 1e-3 * (1 - 1e-5) and delta.max() <= 0.1 * (1 + 1e-5)
        torch.testing.assert_close(
            delta.log().mean(), torch.tensor([1e-3, 0.1]).log().mean().double(), rtol=0.05, atol=0
        )
    one, two = apart.dt_bias.detach().view(2, -1)
    assert abs(float(torch.corrcoef(torch.stack((one, two)))[0, 1])) < 0.15
    floor = build_block("mixer", {"type": "mamba", "dt_min": 1e-6, "dt_max": 1e-5, "dt_floor": 1e-4})
    torch.testing.assert_close(
        torch.nn.functional.softplus(floor.dt_bias), torch.full((16,), 1e-4).double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("untied", [[], ["in_proj", "x_proj", "out_proj"], PARTS["mamba"]])
def test_the_bias_of_step_sizes_is_never_lost(untied):
    block, context = build_block("mixer", {"type": "mamba", "untied": untied}), stream("ttiit")
    x = values(context)
    before = block(x, context)
    with torch.no_grad():
        block.dt_bias += 1
    assert ((block(x, context) - before).abs().amax(-1) > 1e-6).all()


def test_first_decay_is_s4d_real():
    block = build_block("mixer", MIXERS["mamba"])
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 5.0).double().expand(16, 4), rtol=1e-6, atol=0)
    assert torch.equal(block.D, torch.ones(16).double())


@pytest.mark.parametrize("name", MIXERS)
def test_a_bf16_block_is_near_its_fp32_self(name):
    block, context = build_block("mixer", MIXERS[name]).bfloat16().float(), stream(*PACKED)
    x = values(context).detach().bfloat16().float()
    expected = block(x, context)
    y = block.bfloat16()(x.bfloat16(), context)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.03 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("backend", OPERATIONS["scan"])
@pytest.mark.parametrize("name", MIXERS)
def test_every_backend_gives_the_same_block(name, backend):
    if getattr(OPERATIONS["scan"][backend], "missing", lambda: None)() is not None:
        pytest.skip(OPERATIONS["scan"][backend].missing())
    asked = {operation: backend for operation in ("scan", "ssd", "conv")}
    context = stream(*PACKED)
    x = values(context).detach().float()
    ours, theirs = (
        build_block("mixer", MIXERS[name], kernels=choice).float()(x, context)
        for choice in (asked, dict.fromkeys(asked, "reference"))
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_costs():
    context_free = build_block("mixer", {"type": "mamba", "d_state": 4, "dt_rank": 3}, d_model=8)
    inner = 16
    weights = 8 * 2 * inner + inner * (3 + 8) + 3 * inner + inner * 8
    flops = 2 * weights + 2 * 4 * inner + inner * (6 * 4 + 3)
    cost = context_free.cost(100)
    assert cost.flops == (flops,) == context_free.cost(7).flops
    assert cost.active == (sum(p.numel() for p in context_free.parameters()),)
    mixture = build_block("mixer", MIXERS["mixture of mamba"] | {"dt_rank": 3}, d_model=8)
    assert mixture.cost(100) == cost
    assert (
        sum(p.numel() for p in mixture.parameters())
        == sum(p.numel() for p in context_free.parameters()) + weights + inner
    )


def test_towers_share_untied_weights():
    three = (*MODALITIES, "speech")
    options = MIXERS["mixture of mamba"] | {"towers": [["text", "speech"], ["image"]]}
    block = randomise(build_block("mixer", options, modalities=three))
    assert block.in_proj.weight.shape[0] == 2
    context = stream("tisst", modalities=three)
    as_text = stream("titt" + "t", modalities=three)
    x = values(context)
    torch.testing.assert_close(block(x, context), block(x, as_text), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"untied": ["in_prj"]}, r"^mixer.untied\[0\]: 'in_prj': must be 'in_proj', 'x_proj', 'dt_proj' or 'out_proj'"),
        ({"untied": ["in_proj", "in_proj"]}, "^mixer.untied: 'in_proj' stands there twice"),
        ({"towers": [["text", "image"]]}, "^mixer.towers: nothing is untied"),
        ({"untied": ["in_proj"], "towers": [["text"]]}, "^mixer.towers: image in no tower"),
        ({"dt_min": 0.5}, "^mixer.dt_min: 0.5 is above dt_max 0.1"),
        ({"d_conv": 1}, "^mixer.d_conv: 1: must be greater than 1"),
    ],
)
def test_wrong_configs_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_block("mixer", {"type": "mamba", **options})


def test_a_kernel_that_is_not_here_is_refused_when_the_block_is_built():
    with pytest.raises(
        ConfigError, match="^kernels.scan: 'mamba' is not known; known: auto, reference, chunked, cpu, mamba_ssm"
    ):
        build_block("mixer", {"type": "mamba"}, kernels={"scan": "mamba"})


# ----------------------------------------------------------------------------------------------- independent references


@torch.no_grad()
def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=29,
        hidden_size=D_MODEL,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=4,
        expand=2,
        time_step_rank=3,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
        tie_word_embeddings=False,
    )
    theirs = transformers.MambaForCausalLM(config).double().eval()
    mixer = {"type": "mamba", "d_state": 4, "dt_rank": 3}
    ours = build_model({"mixer": mixer, "repeat": 2}).eval()
    weights = {
        "embedding.weight": theirs.backbone.embeddings.weight,
        "norm.weight": theirs.backbone.norm_f.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for i, block in enumerate(theirs.backbone.layers):
        part, at = block.mixer, f"layers.{i}.mixer"
        part.dt_proj.bias.uniform_(-4, 0)
        part.D.uniform_(-1, 1)
        weights |= {
            f"layers.{i}.mixer_norm.weight": block.norm.weight,
            f"{at}.in_proj.weight": part.in_proj.weight,
            f"{at}.conv_weight": part.conv1d.weight,
            f"{at}.conv_bias": part.conv1d.bias,
            f"{at}.x_proj.weight": part.x_proj.weight,
            f"{at}.dt_proj.weight": part.dt_proj.weight,
            f"{at}.dt_bias": part.dt_proj.bias,
            f"{at}.A_log": part.A_log,
            f"{at}.D": part.D,
            f"{at}.out_proj.weight": part.out_proj.weight,
        }
    ours.load_state_dict(weights)
    context = stream("ttiittiitti", "tiitiitiiii")
    tokens = ids(context)
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens, context).to(expected.dtype), expected, rtol=1e-5, atol=1e-5)
