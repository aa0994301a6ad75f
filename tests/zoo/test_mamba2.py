"""Mamba-2's own parts; what it shares with Mamba-1 is tested in test_mamba.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.zoo.helpers import D_MODEL, build_block, build_model, ids, stream, values
from tests.zoo.test_mamba import randomise
from zoo import ConfigError

OPTIONS = {"type": "mamba2", "d_state": 4, "head_dim": 4, "groups": 2}


@torch.no_grad()
def test_a_block_is_its_formula_token_by_token():
    block, context = randomise(build_block("mixer", OPTIONS)), stream("ttiitit")
    x = values(context)[0]
    inner, state, heads = 16, 4, 4
    projected = x @ block.in_proj.weight.T
    z, mixed, dt = projected[:, :inner], projected[:, inner:-heads], projected[:, -heads:]
    h, expected = torch.zeros(heads, 4, state, dtype=torch.float64), []
    for t in range(7):
        past = torch.stack([mixed[t - j] if t >= j else torch.zeros_like(mixed[0]) for j in (3, 2, 1, 0)], dim=1)
        now = F.silu((past * block.conv_weight[:, 0]).sum(1) + block.conv_bias)
        value, B, C = now[:inner].view(heads, 4), now[inner : inner + 8].view(2, state), now[inner + 8 :].view(2, state)
        delta = F.softplus(dt[t] + block.dt_bias)
        y = torch.empty(heads, 4, dtype=torch.float64)
        for head in range(heads):
            decay = torch.exp(-delta[head] * block.A_log[head].exp())
            h[head] = decay * h[head] + delta[head] * torch.outer(value[head], B[head // 2])
            y[head] = h[head] @ C[head // 2] + block.D[head] * value[head]
        gated = y.view(-1) * F.silu(z[t])
        expected.append(block.out_proj.weight @ (gated / (gated.pow(2).mean() + 1e-5).sqrt() * block.norm.weight))
    torch.testing.assert_close(block(x[None], context)[0], torch.stack(expected), rtol=0, atol=1e-12)


def test_costs():
    block = build_block("mixer", OPTIONS)
    inner, mixed, heads = 16, 16 + 2 * 2 * 4, 4
    weights = D_MODEL * (inner + mixed + heads) + inner * D_MODEL
    flops = 2 * weights + 2 * 4 * mixed + inner * (5 * 4 + 3)
    cost = block.cost(100)
    assert cost.flops == (flops,) == block.cost(7).flops
    assert cost.active == (sum(p.numel() for p in block.parameters()),)
    mixture = build_block("mixer", OPTIONS | {"untied": ["in_proj", "dt_bias", "norm", "out_proj"]})
    assert mixture.cost(100) == cost
    more = weights + heads + inner
    assert sum(p.numel() for p in mixture.parameters()) == sum(p.numel() for p in block.parameters()) + more


def test_first_decays_are_between_1_and_16():
    block = build_block("mixer", {"type": "mamba2", "head_dim": 1, "expand": 8})
    assert block.A_log.exp().min() >= 1 and block.A_log.exp().max() <= 16 and block.A_log.std() > 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, r"^mixer.head_dim: 5 does not divide the inner width 16"),
        ({"head_dim": 4, "groups": 3}, r"^mixer.groups: 3 does not divide the 4 heads"),
        ({"head_dim": 4, "untied": ["x_proj"]}, r"^mixer.untied\[0\]: 'x_proj': must be 'in_proj', 'dt_bias', 'norm'"),
    ],
)
def test_wrong_configs_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        build_block("mixer", {"type": "mamba2", **options})


@torch.no_grad()
def test_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        vocab_size=29,
        hidden_size=D_MODEL,
        state_size=4,
        num_hidden_layers=2,
        conv_kernel=4,
        expand=2,
        head_dim=4,
        num_heads=4,
        n_groups=1,
        use_bias=False,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
        chunk_size=4,
        tie_word_embeddings=False,
        rms_norm=True,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    ours = build_model({"mixer": OPTIONS | {"groups": 1}, "repeat": 2}).float().eval()
    weights = {
        "embedding.weight": theirs.backbone.embeddings.weight,
        "norm.weight": theirs.backbone.norm_f.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for i, block in enumerate(theirs.backbone.layers):
        part, at = block.mixer, f"layers.{i}.mixer"
        part.dt_bias.uniform_(-4, 0)
        part.D.uniform_(-1, 1)
        part.norm.weight.uniform_(0.5, 1.5)
        weights |= {
            f"layers.{i}.mixer_norm.weight": block.norm.weight,
            f"{at}.in_proj.weight": part.in_proj.weight,
            f"{at}.conv_weight": part.conv1d.weight,
            f"{at}.conv_bias": part.conv1d.bias,
            f"{at}.dt_bias": part.dt_bias,
            f"{at}.A_log": part.A_log,
            f"{at}.D": part.D,
            f"{at}.norm.weight": part.norm.weight,
            f"{at}.out_proj.weight": part.out_proj.weight,
        }
    ours.load_state_dict(weights)
    context = stream("ttiittiitti", "tiitiitiiii")
    tokens = ids(context)
    torch.testing.assert_close(ours(tokens, context), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
