"""A model of a few hundred weights with every kind of parameter the engine tells apart, and one way to train it."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from pretrain.deepspeed_config import effective
from pretrain.optim import AUXILIARY_SCALE, OptimizerConfig
from zoo.roles import ParameterOwner, Role

WIDTH, EXPERTS, VOCABULARY, ROWS = 8, 2, 11, 4


class Auxiliary(torch.nn.Linear, ParameterOwner):
    roles = {"weight": Role.AUXILIARY, "bias": Role.AUXILIARY}


class Head(torch.nn.Linear, ParameterOwner):
    roles = {"weight": Role.HEAD}


class TinyModel(ParameterOwner):
    """Embedding, a matrix, stacked experts (E, D, F), a norm, a buffer, an auxiliary router, a head."""

    roles = {"A_log": Role.RECURRENCE, "experts": Role.EXPERT_MATRIX}

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.mixer = torch.nn.Linear(WIDTH, WIDTH)
        self.A_log = torch.nn.Parameter(torch.empty(WIDTH, 2))
        self.experts = torch.nn.Parameter(torch.empty(EXPERTS, WIDTH, WIDTH))
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.auxiliary = Auxiliary(WIDTH, 1)
        self.lm_head = Head(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("load", torch.ones(EXPERTS))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-row losses (B,) of predicting tokens (B, T) from those before, and the auxiliary losses (B,)."""
        x = self.embedding(tokens[:, :-1])
        x = x + torch.tanh(self.mixer(x)) * torch.exp(-self.A_log.mean())
        x = x + torch.bmm(x.flatten(0, 1).expand(EXPERTS, -1, -1), self.experts).mean(0).view_as(x)
        score = self.auxiliary(x.detach()).float().squeeze(-1)
        logits = self.lm_head(self.norm(x)).float()
        rows = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").sum(1)
        target = (tokens[:, 1:] % 2).float()
        auxiliary = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none").sum(1)
        return rows, auxiliary


def initialise(model: torch.nn.Module, seed: int, gather: Any) -> None:
    """Weights from (seed, name) alone."""
    for name, parameter in model.named_parameters():
        with gather([parameter]), torch.no_grad():
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.copy_(1 + 0.1 * noise if "norm.weight" in name else 0.4 * noise)


def make_engine(
    stage: int, precision: str = "fp32", world: int = 2, clip: float = 0.0, micro: int = 1, **rest: Any
) -> Any:
    """An engine of the tiny model; `rest`: `optimizer` (its keys), `zero` (keys beside the stage), `build`."""
    from pretrain.engine import Engine
    from pretrain.process_group import prepare_environment

    prepare_environment("cpu")
    optimizer = OptimizerConfig.parse({"lr": 0.01} | rest.get("optimizer", {}))
    config = effective(
        {"zero_optimization": {"stage": stage} | rest.get("zero", {})},
        world=world,
        precision=precision,
        global_batch=ROWS,
        micro_batch=micro,
        clip=clip,
        optimizer=optimizer,
    )
    config.get("optimizer", {}).get("params", {})["torch_adam"] = True  # offloading with no compiler at hand
    return Engine(rest.get("build", TinyModel), initialise, config, optimizer, seed=3, device="cpu", timeout_seconds=40)


def batch(step: int) -> torch.Tensor:
    """The global batch (ROWS, T) of a step."""
    return torch.randint(0, VOCABULARY, (ROWS, 7), generator=torch.Generator().manual_seed(1000 + step))


def train_step(engine: Any, step: int, micro: int = 1, poison: Any = None, auxiliary: float = AUXILIARY_SCALE) -> Any:
    """One step on `batch(step)`, split over ranks and micro-batches; `poison(loss, rank, index)` may spoil a loss."""
    mine = batch(step).view(-1, engine.ranks.world, micro, 7)[:, engine.ranks.rank]
    terms = ROWS * 6
    total = torch.zeros(())
    engine.train()
    for index, tokens in enumerate(mine):
        rows, router = engine.module(tokens)
        loss = (rows.sum() + auxiliary * router.sum()) * engine.ranks.world / terms
        if poison:
            loss = poison(loss, engine.ranks.rank, index)
        engine.backward(loss, last=index == len(mine) - 1)
        total += rows.detach().sum() / terms
    result = engine.step(1.0 / (1 + step))
    return result, float(engine.ranks.sum(total))


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Whole fp32 weights on rank 0."""
    return engine.full_state_dict()


def folder_of(path: Path, *parts: object) -> Path:
    """`path/a-b-c` for parts a, b, c."""
    return path / "-".join(str(p) for p in parts)
