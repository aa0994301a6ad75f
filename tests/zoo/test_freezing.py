"""Modalities trained alone: what the others meet stays, to the bit, and everything of their own learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import zoo
from tests.zoo.helpers import stream
from zoo import Trace, UserError
from zoo.batch import Batch
from zoo.freezing import train_alone

MODALITIES = ("text", "image", "speech")
ATTENTION = {"type": "attention", "heads": 2, "qk_norm": True}
UNTIED = ATTENTION | {"untied": ["q_proj", "k_proj", "v_proj", "o_proj", "qk_norm"]}
DENSE = {"type": "dense", "d_ff": 16, "untied": True}
MOMA = {"type": "moma", "experts": {"text": 2, "image": 2, "speech": 1}, "d_ff": 16, "scope": "row"}
TOKEN_CHOICE = {"type": "token_choice", "top_k": 1, "balance": {"type": "bias"}}
MAMBA = {"type": "mamba", "d_state": 3, "untied": ["in_proj", "x_proj", "dt_proj", "out_proj"]}
MAMBA2 = {"type": "mamba2", "d_state": 3, "head_dim": 8, "untied": ["in_proj", "dt_bias", "norm", "out_proj"]}
LAYERS: dict[str, dict[str, Any]] = {
    "mixture of transformers": {"mixer": UNTIED, "feedforward": DENSE, "untied_norms": True},
    "towers": {"mixer": UNTIED | {"towers": [["text"], ["image", "speech"]]}, "feedforward": DENSE},
    "moma": {"mixer": ATTENTION, "feedforward": MOMA | {"shared_experts": 1}, "norm": "post"},
    "token choice": {"mixer": ATTENTION, "feedforward": MOMA | {"router": TOKEN_CHOICE, "scope": "microbatch"}},
    "mixture of mamba": {"mixer": MAMBA},
    "mixture of mamba 2": {"mixer": MAMBA2, "feedforward": MOMA, "depth": {"type": "mod", "capacity": 0.5}},
}


def config(layer: dict[str, Any]) -> dict[str, Any]:
    ends = {
        "stem": {"image": {"type": "noisy_vectors", "width": 3}},
        "head": {"image": {"type": "vectors", "width": 3}},
    }
    return {"modalities": list(MODALITIES), "d_model": 16, "vocab_size": 24, "layers": [layer, layer], **ends}


def build(layer: dict[str, Any]) -> Any:
    return zoo.build("model", config(layer))


def batch(*rows: str, step: int = 0) -> Batch:
    context = stream(*rows, modalities=MODALITIES, step=step)
    vectors = torch.randn(context.totals[1], 3, generator=torch.Generator().manual_seed(step))
    return Batch(context.modality.clamp(min=0) * 8 + context.position % 5, context, {"image": vectors})


def trained(model: Any, steps: int = 3) -> None:
    heads = zoo.ModelConfig.parse(config(LAYERS["moma"])).own_heads
    objective: Any = zoo.build(
        "objective", {"type": "flow"}, modalities=MODALITIES, heads=heads, bidirectional=("image",)
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    for step in range(steps):
        given, trace = batch("tttt[iiii]ttsss|tt[iiii]tt", "ttttttssss|tt[iiii]ttsss|", step=step), Trace()
        loss = objective.combine(objective(model, given.under(trace=trace)), objective.counts(given))
        optimizer.zero_grad()
        (loss + sum(total for total, _ in trace.losses.values())).backward()
        optimizer.step()


@pytest.mark.parametrize("name", LAYERS)
def test_what_other_tokens_meet_stays_to_the_bit(name: str) -> None:
    model, alone = build(LAYERS[name]), batch("tttttttt|tttttttttt", "ttssst|ttttttttttss")
    before = model.eval()(alone.tokens, alone.context)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    train_alone(model, ["image"])
    trained(model.train())
    assert torch.equal(model.eval()(alone.tokens, alone.context), before)
    after = {key: value for key, value in model.state_dict().items() if not value.equal(first[key])}
    assert {"stems.image.weight", "stems.image.time", "heads.image.weight"} < after.keys()
    assert any(key.startswith("layers.0.") for key in after)
    stacks = [key for key in after if after[key].dim() == 3 and after[key].shape[0] == len(MODALITIES)]
    for key in stacks:  # of each stack the weights of images alone
        assert [not a.equal(b) for a, b in zip(after[key], first[key], strict=True)] == [False, True, False], key


def test_every_weight_of_its_own_learns() -> None:
    model = build(LAYERS["mixture of transformers"])
    first = {key: value.clone() for key, value in model.state_dict().items()}
    train_alone(model, ["image"])
    trained(model.train())
    still = [key for key, value in model.state_dict().items() if value.equal(first[key])]
    assert still == ["embedding.weight", "norm.weight", "head.weight"]


def test_two_modalities_share_a_tower() -> None:
    model = build(LAYERS["towers"])
    first = model.state_dict()["layers.0.mixer.q_proj.weight"].clone()
    train_alone(model, ["image"])
    assert not model.layers[0].mixer.q_proj.weight.requires_grad, "speech meets the tower, too"
    model = build(LAYERS["towers"])
    train_alone(model, ["image", "speech"])
    trained(model.train())
    now = model.state_dict()["layers.0.mixer.q_proj.weight"]
    assert now[0].equal(first[0]) and not now[1].equal(first[1])


def test_nothing_of_its_own() -> None:
    layer = {"mixer": ATTENTION, "feedforward": {"type": "dense", "d_ff": 16}}
    model = zoo.build("model", {"modalities": ["text", "image"], "d_model": 16, "vocab_size": 8, "layers": [layer]})
    with pytest.raises(UserError, match="^train.trainable: image: every weight of the model is shared"):
        train_alone(model, ["image"])  # pyrefly: ignore[bad-argument-type]
