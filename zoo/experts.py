"""Expert choice: feed-forward experts that pick their tokens, as many FLOPs as one dense feed-forward.

The shared mechanism of `experts` (one group over all tokens) and `moma` (one group a modality).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo import kernels, noise
from zoo.config import ConfigError
from zoo.context import CAUSAL, TokenContext
from zoo.flops import Cost
from zoo.layers import RMSNorm
from zoo.registry import BlockConfig, Place, RouterSlot, register
from zoo.routers import (
    AuxiliaryRouter,
    Candidates,
    Capacity,
    LinearRouter,
    Route,
    Scope,
    decide,
    membership,
    record_load,
    train_auxiliary,
)


class ExpertConfig(BlockConfig):
    """What every expert-choice feed-forward can be told."""

    d_ff: int = Field(gt=0)
    """Hidden width F of one expert."""
    capacity: Capacity | None = None
    """Share of its group's tokens an expert takes; default 1 / experts: the cost of one dense feed-forward."""
    scope: Scope = "microbatch"
    gate: Literal["outside", "inside"] = "outside"
    """With post-norm: Σ G · N(FFN(x)), or N(Σ G · FFN(x)) as published, which cancels the gate of a token with a single
    expert. No difference with pre-norm."""
    auxiliary: bool = True
    """Train a causal router beside the main one. Without it the block has no causal mode."""
    router: RouterSlot = Field(default_factory=LinearRouter.Config)

    def share(self, experts: int) -> Fraction:
        """The capacity of a group of `experts`."""
        return Fraction(1, experts) if self.capacity is None else Fraction(str(self.capacity))


class StackedSwiGLU(nn.Module):
    """E SwiGLU experts of one shape, their weights stacked: every rank touches all of them, whatever its tokens."""

    def __init__(self, experts: int, d_ff: int, place: Place) -> None:
        super().__init__()
        self.out_scale = (2 * place.layers) ** -0.5
        self.w_in = nn.Parameter(torch.empty(experts, place.d_model, 2 * d_ff))
        self.w_out = nn.Parameter(torch.empty(experts, d_ff, place.d_model))
        self.kernel = kernels.choose("experts", place.kernels.get("experts", "auto")).module

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        scale = self.out_scale if name == "w_out" else 1.0
        parameter.normal_(0.0, scale * parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        """x (R, D), rows sorted by expert, `counts` rows each → (R, D)."""
        return self.kernel.grouped_swiglu(x, counts, self.w_in, self.w_out)


class ExpertGroup(nn.Module):
    """A router, its causal stand-in, and the experts that compete for the same tokens."""

    def __init__(self, experts: int, config: ExpertConfig, place: Place) -> None:
        super().__init__()
        self.name, self.count, self.share, self.scope = place.name, experts, config.share(experts), config.scope
        self.router = config.router.block(config.router, place.child("router"), experts)
        needed = config.auxiliary and self.router.looks_ahead
        self.auxiliary = AuxiliaryRouter(place.child("auxiliary"), experts) if needed else None
        self.experts = StackedSwiGLU(experts, config.d_ff, place.child("experts"))

    def route(self, x: Tensor, member: Tensor, counts: tuple[int, ...], context: TokenContext) -> tuple[Route, Tensor]:
        """Decide for the group's tokens x (n, D), flat indices `member` (n,), `counts` of them in each row; also the
        weights (R,), fp32."""
        candidates = Candidates(counts, self.share, self.scope, context.key.reshape(-1)[member], context)
        scores = self.router(x, candidates.key, noise.salt(self.name, context.step))  # (n, E)
        logits = None if self.auxiliary is None else self.auxiliary(x)
        causal = context.routing == CAUSAL and self.router.looks_ahead
        if causal and logits is None:
            raise ConfigError(
                f"{self.name}.auxiliary: false; causal routing needs the auxiliary router, set it to true"
            )

        def choose() -> Route:
            return Route.of_membership(logits > 0) if causal else self.router.choose(scores.detach(), candidates)

        route = decide(context, self.name, choose)
        record_load(context, self.name, sum(route.counts), x.shape[0] * self.count)
        if not causal and logits is not None:
            train_auxiliary(context, self.name, logits, membership(route.token.view(self.count, -1), x.shape[0]))
        self.router.observe(x, scores, route, self.name, context)
        return route, self.router.weigh(scores, route)


class ExpertChoice(nn.Module):
    """Groups of experts over parts of the tokens: gather once, compute, weigh, add once."""

    def __init__(self, groups: dict[str, int], config: ExpertConfig, place: Place) -> None:
        super().__init__()
        self.groups = nn.ModuleDict(
            {name: ExpertGroup(experts, config, place.child(f"groups.{name}")) for name, experts in groups.items()}
        )
        self.owns_norm = place.norm == "post" and config.gate == "outside"
        self.norm = RMSNorm(place.d_model) if self.owns_norm else None

    def members(self, context: TokenContext) -> list[tuple[Tensor, tuple[int, ...]]]:
        """For each group the flat indices of its tokens (n,) in row order, and how many each row has."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: TokenContext, state: None = None) -> Tensor:
        """(B, T, D) → Σ over the experts that took a token of weight · SwiGLU(x); 0 where none did."""
        flat = x.reshape(-1, x.shape[-1])
        tokens, weights, counts = [], [], []
        for group, (member, rows) in zip(self.groups.values(), self.members(context), strict=True):
            route, weight = group.route(F.embedding(member, flat), member, rows, context)
            tokens.append(member.index_select(0, route.token))
            weights.append(weight)
            counts.append(route.counts)
        token = torch.cat(tokens)
        parts = F.embedding(token, flat).split([sum(c) for c in counts])
        y = torch.cat(
            [group.experts(part, c) for group, part, c in zip(self.groups.values(), parts, counts, strict=True)]
        )
        if self.norm is not None:
            y = self.norm(y)
        y = y * torch.cat(weights).unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(flat).index_add(0, token, y).view_as(x)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """What a modality pays depends on its group alone: each expert for its share, nominal or as in `load`."""
        norm = 0 if self.norm is None else self.norm.weight.numel()
        rows = []
        for name in self.group_of_modality:
            group = self.groups[name]
            share = (load or {}).get(group.name, float(group.share))
            used = share * (group.experts.w_in.numel() + group.experts.w_out.numel())
            router = group.router.weight.numel()
            auxiliary = 0 if group.auxiliary is None else group.auxiliary.weights
            rows.append((2.0 * used, used + router + auxiliary + norm, 2.0 * router, 2.0 * auxiliary))
        flops, active, router, auxiliary = zip(*rows, strict=True)
        return Cost(flops, active, router, auxiliary)


@register("feedforward", "experts")
class Experts(ExpertChoice):
    """Expert-choice mixture over all tokens, whatever their modality (arXiv 2202.09368; MoMa's "MoE 8x" baseline)."""

    class Config(ExpertConfig):
        experts: int = Field(gt=0)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__({"all": config.experts}, config, place)
        self.group_of_modality = ["all"] * len(place.modalities)

    def members(self, context: TokenContext) -> list[tuple[Tensor, tuple[int, ...]]]:
        return [(context.tokens, context.row_counts)]
