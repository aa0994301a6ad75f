"""Every mixer × {MoMa, Mixture-of-Transformers, dense} × {MoD, none} × {discrete, transfusion, flow} builds, trains and
decodes; what a modality carries and what an objective asks for agree, or are refused with the reason."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import zoo
from pretrain import recipe as recipes
from tests.zoo.helpers import columns, stream
from zoo import ConfigError, Trace
from zoo.batch import Batch

MODALITIES = ("text", "image")
UNTIED = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"],
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "mamba2": ["in_proj", "dt_bias", "norm", "out_proj"],
}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention", "heads": 2, "qk_norm": True},
    "mamba": {"type": "mamba", "d_state": 3},
    "mamba2": {"type": "mamba2", "d_state": 3, "head_dim": 8},
}
DENSE = {"type": "dense", "d_ff": 16}
MOMA = {"type": "moma", "experts": {"text": 2, "image": 2}, "d_ff": 16, "scope": "row"}
MOD = {"type": "mod", "capacity": "1/2"}
OBJECTIVES = ("autoregressive", "transfusion", "flow")
COMBINATIONS = list(itertools.product(MIXERS, ("moma", "mot", "dense"), ("none", "mod"), OBJECTIVES))


def layer(mixer: str, split: str) -> dict[str, Any]:
    if split == "mot":
        untied = {"mixer": MIXERS[mixer] | {"untied": UNTIED[mixer]}, "untied_norms": True}
        return untied | {"feedforward": DENSE | {"untied": True}}
    return {"mixer": MIXERS[mixer], "feedforward": MOMA if split == "moma" else DENSE}


def model_config(mixer: str, split: str, depth: str, objective: str) -> dict[str, Any]:
    one = layer(mixer, split)
    ends: dict[str, Any] = {}
    if objective != "autoregressive":
        ends = {
            "stem": {"image": {"type": "noisy_vectors", "width": 3}},
            "head": {"image": {"type": "vectors", "width": 3}},
        }
    layers = [one, one | ({"depth": MOD} if depth == "mod" else {})]
    return {"modalities": list(MODALITIES), "d_model": 16, "vocab_size": 16, "layers": layers} | ends


def batch(objective: str, step: int = 0) -> Batch:
    """Rows of captions and pictures of four positions, packed; the same content in every step."""
    rows = ("tttt[iiii]tt|tt[iiii]tt", "tttttttttt|tt[iiii]tt")
    if objective == "autoregressive":
        rows = tuple(row.replace("[", "").replace("]", "") for row in rows)
    context = stream(*rows, step=step)
    tokens = context.modality.clamp(min=0) * 8 + context.position % 5
    if objective == "autoregressive":
        return Batch(tokens, context)
    tokens = torch.where(context.modality == 1, 8, tokens)
    vectors = torch.randn(context.totals[1], 3, generator=torch.Generator().manual_seed(0))
    return Batch(tokens, context, {"image": vectors})


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_it_trains(combination: tuple[str, str, str, str]) -> None:
    """The loss falls, at the noise of a single step; no parameter is left out."""
    config, kind = zoo.ModelConfig.parse(model_config(*combination)), combination[3]
    model: Any = zoo.build("model", config)
    bidirectional = () if kind == "autoregressive" else ("image",)
    objective: Any = zoo.build("objective", {"type": kind}, heads=config.own_heads, bidirectional=bidirectional)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses, given = [], batch(kind)
    for _ in range(4):
        trace = Trace()
        loss = objective.combine(objective(model, given.under(trace=trace)), objective.counts(given))
        auxiliary = sum(total for total, _ in trace.losses.values())
        optimizer.zero_grad()
        (loss + 0.01 * auxiliary).backward()
        losses.append(float(loss.detach()))
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing, missing
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0], losses


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
@torch.no_grad()
def test_it_decodes(combination: tuple[str, str, str, str]) -> None:
    """Causal, items whole, a state carried from chunk to chunk."""
    model: Any = zoo.build("model", model_config(*combination)).double().eval()
    given = batch(combination[3])
    given = given.under(routing="causal")
    content = {name: values.double() for name, values in given.content.items()}
    full, states = model(given.tokens, given.context, content=content), model.init_state(*given.context.shape)
    column, ends = given.context.index(1) % given.context.shape[1], [0, 1, 2, 4, 8, 10, 12, 16, 18]
    parts = []
    for start, stop in itertools.pairwise(ends):
        here = (column >= start) & (column < stop)
        step = {name: values[here] for name, values in content.items()}
        parts.append(model(given.tokens[:, start:stop], columns(given.context, start, stop), states, step))
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=1e-10)


def recipe(image: Mapping[str, Any], objective: str) -> dict[str, Any]:
    return {
        "name": "matrix",
        "modalities": {"text": {"type": "bytes"}, "image": {"image_size": 8, "patch": 4} | image},
        "model": {"d_model": 16, "layers": [layer("attention", "dense")]},
        "objective": {"type": objective},
        "data": {"path": "x", "sequence_length": 64},
        "optimizer": {"lr": 1e-3},
        "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
    }


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("image", "fits", "reason"),
    [
        ({"type": "patches"}, {"autoregressive"}, "and no modality has such items"),
        ({"type": "continuous_patches"}, {"autoregressive"}, "and no modality has such items"),
        (
            {"type": "continuous_patches", "mask": "bidirectional"},
            {"transfusion", "flow"},
            "'autoregressive' predicts every position from those before it",
        ),
    ],
)
def test_what_is_carried_and_what_is_asked_for_agree(
    image: Mapping[str, Any], fits: set[str], reason: str, objective: str
) -> None:
    if objective in fits:
        assert recipes.resolve(recipe(image, objective)).objective.type_name == objective
    else:
        with pytest.raises(ConfigError, match=r"^objective\.type: .*" + reason):
            recipes.resolve(recipe(image, objective))
