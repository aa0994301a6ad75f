"""What the optimizer is told: its config, the groups it treats differently, the learning rate at a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
import torch

from zoo.config import Config
from zoo.roles import Role, parameter_roles

AUXILIARY_SCALE = 2.0**-16
"""Factor on the loss of the auxiliary (causal) routers *and* on Adam's epsilon of their group.

Adam divides a gradient by its own size, so g and 2⁻¹⁶·g give the same update when epsilon shrinks alike; a
power of two makes that exact. In the global gradient norm such gradients vanish (their share of the square is
2⁻³²), so that clipping treats the main model as if the routers were not there. Routers that train alone, round a
frozen model, are not scaled.
"""

DECAYED = {
    Role.MATRIX,
    Role.MODALITY_MATRIX,
    Role.EXPERT_MATRIX,
    Role.CONVOLUTION,
    Role.HEAD,
    Role.ROUTER,
}
"""What weight decay acts on. Not on vectors, gains of norms, and the decay and skip of a recurrence; not on routers
added to a pretrained model, whose few weights it would flatten beside those; not on embeddings, whose rows it would
shrink in proportion to how rarely a token is seen."""


class OptimizerConfig(Config):
    """How gradients become updates."""

    type: Literal["adamw", "muon"] = "adamw"
    """"muon": DeepSpeed's Muon for matrices inside layers, AdamW for all else; `pretrain.deepspeed_config` decides
    under which ZeRO stages it is sound."""
    lr: float = pydantic.Field(gt=0)
    """Peak learning rate of AdamW."""
    betas: Annotated[tuple[float, float], pydantic.Field(strict=False)] = (0.9, 0.95)
    """How slowly AdamW's averages of the gradient and of its square change."""
    eps: float = pydantic.Field(default=1e-8, gt=0)
    """Added to the denominator of AdamW's update."""
    weight_decay: float = pydantic.Field(default=0.1, ge=0)
    """Share of a matrix that goes at every step, times the learning rate; embeddings, norms and biases keep theirs."""
    momentum: float | None = pydantic.Field(default=None, ge=0, lt=1)
    """Momentum of Muon; default 0.95. Under type muon only."""
    muon_lr: float | None = pydantic.Field(default=None, gt=0)
    """Peak learning rate of Muon's matrices; required under type muon, for which 0.02 is usual."""

    @pydantic.field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both betas must lie in [0, 1), for example [0.9, 0.95]")
        return value

    @pydantic.model_validator(mode="after")
    def _muon_keys(self) -> OptimizerConfig:
        if self.type == "muon" and self.muon_lr is None:
            raise ValueError("type muon needs muon_lr, the peak learning rate of its matrices; 0.02 is usual")
        if self.type != "muon" and (self.muon_lr is not None or self.momentum is not None):
            raise ValueError("muon_lr and momentum belong to type: muon; remove them or choose that type")
        return self


class ScheduleConfig(Config):
    """The learning rate over the steps: a linear warm-up, then one of three shapes down to a fraction of the peak."""

    type: Literal["cosine", "linear", "wsd"] = "cosine"
    """"cosine" and "linear" fall from the end of the warm-up to the last step; "wsd" (warm-up, stable, decay) stays at
    the peak and falls linearly over the last `decay_steps`."""
    warmup_steps: int = pydantic.Field(default=0, ge=0)
    """Steps from 0 to the peak."""
    final_fraction: float = pydantic.Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step over the peak."""
    decay_steps: int | None = pydantic.Field(default=None, gt=0)
    """Steps of the final fall; required under type wsd, which alone has it."""

    @pydantic.model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> ScheduleConfig:
        if self.type == "wsd" and self.decay_steps is None:
            raise ValueError("type wsd needs decay_steps, the length of its final fall in optimizer steps")
        if self.type != "wsd" and self.decay_steps is not None:
            raise ValueError(f"decay_steps belongs to type: wsd, not {self.type}; remove it or choose that type")
        return self


def learning_rate_factor(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0) as a fraction of the peak; a pure function of its arguments.

    The first update uses 1 / warmup_steps, update warmup_steps the peak, an update past the end
    final_fraction.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    start = schedule.warmup_steps
    if schedule.type == "wsd":
        assert schedule.decay_steps is not None
        start = max(start, total_steps - schedule.decay_steps)
    progress = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    fall = (1 + math.cos(math.pi * progress)) / 2 if schedule.type == "cosine" else 1 - progress
    return schedule.final_fraction + (1 - schedule.final_fraction) * fall


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter; under ZeRO-3 its own `shape` is that of an empty placeholder."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def group_of(role: Role, muon: bool = False) -> str:
    """The group of a parameter: `"auxiliary"`, `"no_decay"` or `"decay"`; under Muon `"muon"` for a single hidden
    matrix.

    Stacked 3-D weights stay with Adam (DeepSpeed's bf16 optimizer refuses them), as do embeddings, heads and routers.
    """
    if role is Role.AUXILIARY:
        return "auxiliary"
    if muon and role is Role.MATRIX:
        return "muon"
    return "decay" if role in DECAYED else "no_decay"


def roles(model: torch.nn.Module) -> dict[str, Role]:
    """The role of every parameter by name, also where parameters are partitioned."""
    return parameter_roles(model, full_shape)


def parameter_groups(model: torch.nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters of `model` in disjoint groups, empty groups left out.

    Returns: one dictionary a group with `name` ("decay", "no_decay", "auxiliary", and "muon" under Muon),
    `params` in the model's order, and the group's own lr, weight_decay, and betas and eps or momentum. With
    Muon each also has `use_muon`.
    """
    members: dict[str, list[torch.nn.Parameter]] = {"decay": [], "no_decay": [], "auxiliary": [], "muon": []}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    role = roles(model)
    for name, parameter in trainable:
        members[group_of(role[name], muon=config.type == "muon")].append(parameter)

    alone = not any(params for name, params in members.items() if name != "auxiliary")
    groups = [_settings(name, config, alone) | {"params": params} for name, params in members.items() if params]
    grouped = sum(_count(group["params"]) for group in groups)
    total = _count(p for _, p in trainable)
    assert grouped == total, f"the groups hold {grouped} of {total} trainable parameters"
    return groups


def freeze_main(model: torch.nn.Module) -> None:
    """Leave the auxiliary routers the only parameters of `model` that train."""
    role = roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role[name] is Role.AUXILIARY)


def _settings(name: str, config: OptimizerConfig, alone: bool) -> dict[str, Any]:
    """`alone`: nothing else trains, and the loss of auxiliary routers is not scaled."""
    if name == "muon":
        momentum = 0.95 if config.momentum is None else config.momentum
        return {
            "name": name,
            "lr": config.muon_lr,
            "weight_decay": config.weight_decay,
            "momentum": momentum,
            "use_muon": True,
        }
    settings: dict[str, Any] = {
        "name": name,
        "lr": config.lr,
        "weight_decay": config.weight_decay if name == "decay" else 0.0,
        "betas": config.betas,
        "eps": config.eps * AUXILIARY_SCALE if name == "auxiliary" and not alone else config.eps,
    }
    return settings | {"use_muon": False} if config.type == "muon" else settings


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(math.prod(full_shape(p)) for p in parameters)
