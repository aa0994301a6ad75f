"""Schedules as formulas, groups as lists of names, and the arithmetic behind the auxiliary scale."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.optim import (
    AUXILIARY_SCALE,
    OptimizerConfig,
    ScheduleConfig,
    group_of,
    learning_rate_factor,
    parameter_groups,
    uses_muon,
)
from tests.pretrain.tiny import TinyModel
from zoo.config import ConfigError


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


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("layers.0.mixer.A_log", (4, 8), "no_decay"),
        ("layers.0.mixer_norm.weight", (2, 8), "no_decay"),
        ("layers.0.mixer.text.D", (4, 8), "no_decay"),
        ("layers.0.mixer.in_projection.weight", (2, 4, 8), "decay"),
        ("layers.0.norm.weight", (8,), "no_decay"),
        ("layers.0.depth.auxiliary.weight", (1, 8), "auxiliary"),
        ("layers.0.feedforward.router.weight", (4, 8), "decay"),
        ("tokens.embedding.weight", (50, 8), "no_decay"),
    ],
)
def test_group_of(name: str, shape: tuple[int, ...], group: str) -> None:
    assert group_of(name, shape) == group


def test_uses_muon() -> None:
    assert uses_muon("layers.0.mixer.out_projection.weight", (8, 8))
    assert not uses_muon("layers.0.feedforward.router.weight", (4, 8))
    assert not uses_muon("layers.0.feedforward.experts", (4, 8, 8))
    assert not uses_muon("lm_head.weight", (50, 8))


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
