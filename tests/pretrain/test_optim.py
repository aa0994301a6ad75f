"""Schedules as formulas, groups as lists of names, and the arithmetic behind the auxiliary scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import zoo
import zoo.adapt as za
from pretrain import recipe as recipes
from pretrain.optim import (
    AUXILIARY_SCALE,
    OptimizerConfig,
    ScheduleConfig,
    freeze_main,
    group_of,
    learning_rate_factor,
    parameter_groups,
    roles,
)
from tests.pretrain.tiny import TinyModel
from tests.zoo.adapt.families import llava
from zoo.config import ConfigError

ROOT = Path(__file__).parents[2]


def factors(total: int, **keys: object) -> list[float]:
    schedule = ScheduleConfig.parse(keys)
    return [learning_rate_factor(schedule, step, total) for step in range(total + 2)]


def test_cosine() -> None:
    values = factors(10, type="cosine", warmup_steps=2, final_fraction=0.1)
    assert values[:3] == [0.5, 1.0, 1.0]
    for step in range(2, 10):
        assert values[step] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2)
    assert values[10:] == pytest.approx([0.1, 0.1])


def test_linear_without_warmup() -> None:
    assert factors(4, type="linear", final_fraction=0.0) == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_wsd_stays_then_falls() -> None:
    values = factors(10, type="wsd", warmup_steps=4, decay_steps=4, final_fraction=0.2)
    assert values[:7] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0])
    assert values[7:11] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_warmup_as_long_as_the_run() -> None:
    assert factors(4, warmup_steps=4)[:4] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "wsd"}, "schedule: .*needs decay_steps"),
        ({"type": "cosine", "decay_steps": 3}, "belongs to type: wsd"),
        ({"warmup": 3}, "schedule.warmup: unknown key; known: .*did you mean 'warmup_steps'"),
        ({"final_fraction": 2.0}, "schedule.final_fraction: 2.0: must be less than or equal to 1"),
    ],
)
def test_schedule_errors(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig.parse(keys, "schedule")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "optimizer.lr: this key is required"),
        ({"lr": -1.0}, "optimizer.lr: -1.0: must be greater than 0"),
        ({"lr": 0.1, "betas": [0.9, 1.0]}, r"optimizer.betas: .*must lie in \[0, 1\)"),
        ({"lr": 0.1, "type": "muon"}, "needs muon_lr"),
        ({"lr": 0.1, "momentum": 0.9}, "belong to type: muon"),
    ],
)
def test_optimizer_errors(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig.parse(keys, "optimizer")


def names_by_group(config: OptimizerConfig) -> dict[str, list[str]]:
    model = TinyModel()
    name_of = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: [name_of[id(p)] for p in g["params"]] for g in parameter_groups(model, config)}


def test_every_parameter_is_in_one_group() -> None:
    config = OptimizerConfig.parse({"lr": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.3})
    assert names_by_group(config) == {
        "decay": ["experts", "mixer.weight", "lm_head.weight"],
        "no_decay": ["A_log", "embedding.weight", "mixer.bias", "norm.weight", "norm.bias"],
        "auxiliary": ["auxiliary.weight", "auxiliary.bias"],
    }
    groups = {g["name"]: g for g in parameter_groups(TinyModel(), config)}
    assert [groups[n]["weight_decay"] for n in ("decay", "no_decay", "auxiliary")] == [0.3, 0.0, 0.0]
    assert groups["auxiliary"]["eps"] == 1e-6 * 2.0**-16
    assert all(g["lr"] == 0.1 and g["betas"] == (0.8, 0.9) for g in groups.values())


def test_muon_gets_single_hidden_matrices_only() -> None:
    config = OptimizerConfig(lr=0.1, type="muon", muon_lr=0.02)
    groups = names_by_group(config)
    assert groups["muon"] == ["mixer.weight"]
    assert groups["decay"] == ["experts", "lm_head.weight"]
    settings = {g["name"]: g for g in parameter_groups(TinyModel(), config)}
    assert (settings["muon"]["lr"], settings["muon"]["momentum"], settings["muon"]["use_muon"]) == (
        0.02,
        0.95,
        True,
    )
    assert settings["decay"]["use_muon"] is False


NO_DECAY = {
    "A_log",
    "D",
    "dt_bias",
    "conv_bias",
    "embedding",
    "norm",
    "mixer_norm",
    "feedforward_norm",
    "q_norm",
    "k_norm",
    "first_gain",
    "second_gain",
    "bias",
}
"""What weight decay spares in our own models, by the last word of a name that is not `weight`."""
MATRICES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "x_proj", "dt_proj", "out_proj"),
    *("w_in", "w_out"),  # of a feed-forward; those of experts are stacked
    "time",  # the projection of the time features of a denoised item
}
"""What Muon may have, where it is one matrix and not one a modality."""
OURS = sorted(file for folder in ("tiny", "models") for file in (ROOT / "recipes" / folder).glob("*.yaml"))


def expected(name: str, dimensions: int) -> str:
    """The group of a parameter of ours under Muon."""
    words = [word for word in name.split(".") if word != "weight"]
    if "auxiliary" in words:
        return "auxiliary"
    if words[-1] in NO_DECAY:
        return "no_decay"
    return "muon" if words[-1] in MATRICES and dimensions == 2 else "decay"


@pytest.mark.parametrize("recipe", OURS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_groups_of_every_recipe(recipe: Path) -> None:
    """The same as when groups were found by names, of which this is an independent statement."""
    data = recipes.read(recipe)
    config = {"modalities": list(data["modalities"]), "vocab_size": 64, **data["model"]}
    with torch.device("meta"):
        model = zoo.build("model", config, seed=None)
    dimensions = {name: parameter.dim() for name, parameter in model.named_parameters()}
    found = {name: group_of(role, muon=True) for name, role in roles(model).items()}
    assert found == {name: expected(name, count) for name, count in dimensions.items()}
    without = {name: group_of(role) for name, role in roles(model).items()}
    assert without == {name: "decay" if group == "muon" else group for name, group in found.items()}


LLAVA = {
    "muon": {
        *(f"model.language_model.layers.{i}.self_attn.{x}_proj.weight" for i in range(4) for x in "qkvo"),
        *(f"model.language_model.layers.{i}.mlp.{x}_proj.weight" for i in range(4) for x in ("gate", "up", "down")),
        *(f"model.vision_tower.encoder.layers.{i}.self_attn.{x}.weight" for i in (0, 1) for x in ("q_proj", "k_proj")),
        *(
            f"model.vision_tower.encoder.layers.{i}.self_attn.{x}.weight"
            for i in (0, 1)
            for x in ("v_proj", "out_proj")
        ),
        *(f"model.vision_tower.encoder.layers.{i}.mlp.{x}.weight" for i in (0, 1) for x in ("fc1", "fc2")),
        *(f"model.multi_modal_projector.linear_{i}.weight" for i in (1, 2)),
    },
    "decay": {"lm_head.weight"},
}
"""Groups of an adapted LLaVA; all else, its routers, norms, biases, embeddings and patches, is not decayed."""


def test_groups_of_an_adapted_model() -> None:
    model = llava()
    za.adapt(model, {"layers": [1, 2], "capacity": {"type": "constant", "value": 0.5}})
    found: dict[str, set[str]] = {}
    for name, role in roles(model).items():
        found.setdefault(group_of(role, muon=True), set()).add(name)
    rest = {name for name, _ in model.named_parameters()} - LLAVA["muon"] - LLAVA["decay"]
    assert found == LLAVA | {"no_decay": rest} and sum("mod_router" in name for name in rest) == 2


def test_only_auxiliary_routers_are_left_to_train() -> None:
    model = TinyModel()
    freeze_main(model)
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trains == ["auxiliary.weight", "auxiliary.bias"]


def test_frozen_parameters_are_left_out() -> None:
    model = TinyModel()
    model.experts.requires_grad_(False)
    held = [p for g in parameter_groups(model, OptimizerConfig(lr=0.1)) for p in g["params"]]
    assert len(held) == len(list(model.parameters())) - 1


def test_scaled_loss_and_epsilon_give_the_same_updates() -> None:
    """Bit for bit: Adam on 2⁻¹⁶·g with 2⁻¹⁶·ε moves the weights as Adam on g with ε."""
    torch.manual_seed(0)
    start, gradients = torch.randn(64), torch.randn(20, 64) * 10.0 ** torch.randint(-6, 2, (20, 64))
    ends = []
    for scale in (1.0, AUXILIARY_SCALE):
        weight = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weight], lr=0.01, eps=1e-8 * scale, weight_decay=0.0)
        for gradient in gradients:
            weight.grad = gradient * scale
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)
