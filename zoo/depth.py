"""Mixture-of-Depths: a wrapper round any block that lets only some tokens through (arXiv 2404.02258 §3).

    y = x + g · (block(x̃) − x̃)   for the kept tokens x̃,   y = x for the others.

Kept tokens stay in time order with their original positions and documents; skipped ones are neither queries nor keys.
For a recurrent mixer the recurrence runs over the kept tokens: this project's definition, no paper gives one.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo import noise
from zoo.config import ConfigError
from zoo.context import CAUSAL, TokenContext
from zoo.flops import Cost
from zoo.registry import BlockConfig, Place, RouterSlot, register
from zoo.routers import (
    AuxiliaryRouter,
    Capacity,
    LinearRouter,
    Scope,
    capacity_count,
    decide,
    expert_choice,
    membership,
    record_load,
    train_auxiliary,
)
from zoo.states import State


@register("depth", "mod")
class MixtureOfDepths(nn.Module):
    class Config(BlockConfig):
        capacity: Capacity = 0.125
        """Share of a scope's tokens that pass through the block."""
        scope: Scope = "row"
        auxiliary: bool = True
        """Train a causal router beside the main one. Without it the block has no causal mode."""
        router: RouterSlot = Field(default_factory=LinearRouter.Config)

    def __init__(self, config: Config, place: Place, block: nn.Module) -> None:
        super().__init__()
        self.name, self.capacity, self.scope = place.name, Fraction(str(config.capacity)), config.scope
        self.modalities = len(place.modalities)
        self.router = config.router.block(config.router, place.child("router"), 1)
        self.auxiliary = AuxiliaryRouter(place.child("auxiliary"), 1) if config.auxiliary else None
        self.block = block

    def forward(self, x: Tensor, context: TokenContext, state: State | None = None) -> Tensor:
        """(B, T, D) → (B, T, D), residual included: it stands where a block stands."""
        rows, columns, width = x.shape
        flat = x.reshape(rows * columns, width)
        salt = noise.salt(self.name, context.step)
        scores = self.router(flat, context.key.reshape(-1), salt)  # (B·T, 1)
        logits = None if self.auxiliary is None else self.auxiliary(flat)
        keep, index, valid, inner = decide(context, self.name, lambda: self._select(scores, logits, context))
        record_load(context, self.name, sum(inner.row_counts), sum(context.row_counts))
        if context.routing != CAUSAL and logits is not None:
            members = context.tokens
            chosen = keep.reshape(-1, 1).index_select(0, members)
            train_auxiliary(context, self.name, logits.index_select(0, members), chosen)
        flat_index = (index + torch.arange(rows, device=x.device)[:, None] * columns).reshape(-1)
        kept = F.embedding(flat_index, flat).view(rows, -1, width).masked_fill(~valid.unsqueeze(-1), 0.0)
        delta = self.block(kept, inner, state) - kept
        weight = F.embedding(flat_index, scores).to(x.dtype) * valid.reshape(-1, 1)
        return flat.index_add(0, flat_index, weight * delta.reshape(-1, width)).view_as(x)

    def _select(
        self, scores: Tensor, logits: Tensor | None, context: TokenContext
    ) -> tuple[Tensor, Tensor, Tensor, TokenContext]:
        """keep (B, T) bool, columns kept (B, K), which of them are real (B, K), and their context."""
        rows, columns = context.shape
        if context.routing == CAUSAL:
            if logits is None:
                raise ConfigError(
                    f"{self.name}.auxiliary: false; causal routing needs the auxiliary router, set it to true"
                )
            keep = (logits.view(rows, columns) > 0) & context.valid
            counts = keep.sum(1).tolist()
        else:
            members = context.tokens
            scopes = context.row_counts if self.scope == "row" else (sum(context.row_counts),)
            index = expert_choice(scores.detach().index_select(0, members), scopes, self.capacity, context)
            keep = membership(members[index], rows * columns).view(rows, columns)
            row_scope = self.scope == "row" or rows == 1
            counts = [capacity_count(n, self.capacity) for n in scopes] if row_scope else keep.sum(1).tolist()
        largest = max(1, *counts)  # the block runs even when nothing is kept: every rank uses every parameter
        index = keep.logical_not().sort(dim=1, stable=True).indices[:, :largest]  # kept columns first, in time order
        valid = torch.arange(largest, device=keep.device) < torch.tensor(counts, device=keep.device)[:, None]
        return keep, index, valid, context.select(index, valid)

    def init_state(self, rows: int, length: int, like: Tensor) -> State:
        return self.block.init_state(rows, length, like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """The block at share · T tokens, for the share that enters it (the capacity, or as in `load`); the router for
        all."""
        share = (load or {}).get(self.name, float(self.capacity))
        router = Cost.of(self.modalities, router=2.0 * self.router.weight.numel(), active=self.router.weight.numel())
        weights = 0 if self.auxiliary is None else self.auxiliary.weights
        auxiliary = Cost.of(self.modalities, auxiliary=2.0 * weights, active=weights)
        return self.block.cost(share * length, load).scaled(share) + router + auxiliary
