"""Mixture-of-Depths: a wrapper round any block that lets only some tokens through (arXiv 2404.02258 §3).

    y = x + g · (block(x̃) − x̃)   for the kept tokens x̃,   y = x for the others.

Kept tokens stay in time order with their original positions and documents; skipped ones are neither queries nor keys.
For a recurrent mixer the recurrence runs over the kept tokens: this project's definition, no paper gives one. Round a
block with experts this is staged MoDE: experts choose among the tokens that were kept.

The gate g weighs the block alone, as in the paper, for every activation of the router. (p-MoD also multiplies skipped
tokens by g, and weighs the feed-forward but not the attention of kept ones.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any

import pydantic
import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from zoo import noise
from zoo.auxiliary import AuxiliaryRouter, train_auxiliary
from zoo.config import ConfigError
from zoo.context import CAUSAL, Kept, TokenContext
from zoo.flops import Cost
from zoo.registry import BlockConfig, Place, RouterSlot, register
from zoo.routers import Capacity, LinearRouter, Router, Scope, capacity_count, decide, expert_choice, membership
from zoo.schedules import OverLayers, WarmDown, number
from zoo.slots import Component, Depth
from zoo.states import State


def _one_or_each(value: Any) -> Any:
    """Check a capacity, or one a modality, so that a wrong one is named by its dotted key."""
    kind = dict[str, Capacity] if isinstance(value, Mapping) else Capacity
    try:
        return pydantic.TypeAdapter(kind).validate_python(value)
    except pydantic.ValidationError as error:
        raise PydanticCustomError("zoo_nested", "nested", {"error": error, "root": BlockConfig}) from None


@dataclasses.dataclass(frozen=True)
class Pool:
    """Tokens that compete with each other: those of one modality, or all."""

    name: str
    """What the trace calls it."""
    modality: int | None
    """None: tokens of every modality."""
    capacity: Fraction
    """Share that is kept, once a step schedule has ended."""

    def members(self, context: TokenContext) -> Tensor:
        """Flat indices into B·T, in row and time order."""
        return context.tokens if self.modality is None else context.index(self.modality)

    def row_counts(self, context: TokenContext) -> tuple[int, ...]:
        """Tokens of each row."""
        return context.row_counts if self.modality is None else tuple(row[self.modality] for row in context.counts)


@register("depth", "mod")
class MixtureOfDepths(Depth, counter_noise=True):
    class Config(BlockConfig):
        capacity: Annotated[float | str | dict[str, float | str], pydantic.BeforeValidator(_one_or_each)] = 0.125
        """Share of a scope's tokens that pass through the block, whatever their modality; or one for each modality,
        `{text: 1.0, image: 0.25}`: each is then chosen among its own tokens, and one at 1.0 does not compete: all its
        tokens pass, ungated."""
        over_layers: OverLayers | None = None
        over_steps: WarmDown | None = None
        scope: Scope = "row"
        auxiliary: bool = True
        """Train a causal router beside the main one. Without it the block has no causal mode."""
        router: RouterSlot = Field(default_factory=LinearRouter.Config)

        def check(self, place: Place, path: str) -> None:
            if isinstance(self.capacity, dict):
                for modality in self.capacity:
                    place.check_modality(modality, f"{path}.capacity.{modality}")
                for modality in place.modalities:
                    if modality not in self.capacity:
                        raise ConfigError(
                            f"{path}.capacity: no entry for {modality!r}; give every modality its share, 1.0 keeps all"
                        )
            for method in ("choose", "score", "weigh", "observe"):
                if getattr(self.router.block, method, getattr(Router, method)) is not getattr(Router, method):
                    raise ConfigError(
                        f"{path}.router.type: {self.router.type_name!r} has its own way to {method} tokens; a depth "
                        "router gives one score, by which the top-k of a scope is kept and weighed: use linear"
                    )
            if getattr(self.router, "activation", None) == "softmax":
                raise ConfigError(
                    f"{path}.router.activation: softmax over a single output is always 1 and learns nothing; use "
                    "sigmoid, raw or tanh"
                )

        def pools(self, place: Place) -> tuple[Pool, ...]:
            """Who competes with whom in the layer at `place`; nobody where the layer is dense."""
            each = self.capacity if isinstance(self.capacity, dict) else {None: self.capacity}
            pools = []
            for modality, least in each.items():
                capacity = number(least)
                competes = modality is None or capacity < 1
                if competes and self.over_layers is not None:
                    capacity = self.over_layers.capacity(place.layer, place.layers, capacity)
                    competes = capacity < 1
                if competes:
                    name = place.name if modality is None else f"{place.name}.{modality}"
                    index = None if modality is None else place.modalities.index(modality)
                    pools.append(Pool(name, index, capacity))
            return tuple(pools)

    def __init__(self, config: Config, place: Place, block: Component) -> None:
        super().__init__()
        self.name, self.scope, self.over_steps = place.name, config.scope, config.over_steps
        self.modalities = len(place.modalities)
        self.pools = config.pools(place)
        if self.pools:
            names = [pool.name for pool in self.pools]
            auxiliary = place.child("auxiliary")
            self.router = config.router.block(config.router, place.child("router"), 1)
            self.auxiliary = AuxiliaryRouter(auxiliary, 1, names) if config.auxiliary else None
        self.block = block

    @property
    def blind(self) -> bool:
        """All tokens compete in one pool, whatever their modality."""
        return len(self.pools) == 1 and self.pools[0].modality is None

    @property
    def capacities(self) -> tuple[Fraction, ...]:
        """Final share of each modality's tokens that pass."""
        if self.blind:
            return (self.pools[0].capacity,) * self.modalities
        own = {pool.modality: pool.capacity for pool in self.pools}
        return tuple(own.get(m, Fraction(1)) for m in range(self.modalities))

    @property
    def capacity(self) -> Fraction:
        """Final share of all tokens that pass; where modalities differ, of a stream with as much of each."""
        return sum(self.capacities, Fraction(0)) / self.modalities

    def forward(self, x: Tensor, context: TokenContext, state: State | None = None) -> Tensor:
        """(B, T, D) → (B, T, D), residual included: it stands where a block stands."""
        if not self.pools:
            return self.block(x, context, state)
        rows, columns, width = x.shape
        flat = x.reshape(rows * columns, width)
        members, sizes = self._candidates(context)
        everybody = members.shape[0] == rows * columns and self.blind
        candidates = flat if everybody else F.embedding(members, flat)  # (n, D)
        key = context.key.reshape(-1).index_select(0, members)
        scores = self.router(candidates, key, noise.salt(self.name, context.step))  # (n, 1)
        logits = None if self.auxiliary is None else self.auxiliary(candidates, sizes)
        taken, index, valid, inner = decide(context, self.name, lambda: self._select(scores, logits, context))
        inner = inner.replace(trace=context.trace)
        self._report(logits, taken, context, inner)
        flat_index = (index + torch.arange(rows, device=x.device)[:, None] * columns).reshape(-1)
        kept = F.embedding(flat_index, flat).view(rows, -1, width).masked_fill(~valid.unsqueeze(-1), 0.0)
        delta = self.block(kept, inner, state) - kept
        ones = scores.new_ones(rows * columns, 1)  # for those that do not compete
        gate = scores if everybody else ones.index_copy(0, members, scores)
        weight = F.embedding(flat_index, gate).to(x.dtype) * valid.reshape(-1, 1)
        return flat.index_add(0, flat_index, weight * delta.reshape(-1, width)).view_as(x)

    def _candidates(self, context: TokenContext) -> tuple[Tensor, tuple[int, ...]]:
        """Flat indices (n,) of the tokens that compete, pool after pool, and how many each pool has."""
        members = [pool.members(context) for pool in self.pools]
        sizes = tuple(part.shape[0] for part in members)
        if len(members) == 1:
            return members[0], sizes
        name = ("depth candidates", tuple(pool.modality for pool in self.pools))
        return context.shared(name, lambda: torch.cat(members)), sizes

    def _select(
        self, scores: Tensor, logits: Tensor | None, context: TokenContext
    ) -> tuple[Tensor, Tensor, Tensor, TokenContext]:
        """taken (n,) bool among the candidates, columns kept (B, K), which of them are real (B, K), their context.

        The context has no trace: the trace keeps what is returned here, and a cycle would outlive the step.
        """
        members, sizes = self._candidates(context)
        kept = None
        if context.routing == CAUSAL:
            if logits is None:
                raise ConfigError(
                    f"{self.name}.auxiliary: false; causal routing needs the auxiliary router, set it to true"
                )
            taken = logits[:, 0] > 0
        else:
            parts = zip(self.pools, scores.detach().split(list(sizes)), strict=True)
            taken = torch.cat([self._top(pool, part, context) for pool, part in parts])
            kept = self._static_counts(context)
        # everybody but padding and the candidates that were not taken
        keep = context.valid.reshape(-1).index_copy(0, members, taken).view(context.shape)
        if kept is None:
            kept = context.kept(keep)
        totals = kept.row_counts
        largest = max(1, *totals)  # the block runs even when nothing is kept: every rank uses every parameter
        index = keep.logical_not().sort(dim=1, stable=True).indices[:, :largest]  # kept columns first, in time order
        valid = torch.arange(largest, device=keep.device) < torch.tensor(totals, device=keep.device)[:, None]
        return taken, index, valid, context.replace(trace=None).select(index, valid, kept)

    def _share(self, pool: Pool, context: TokenContext) -> Fraction:
        """Capacity of a pool at the context's step."""
        if self.over_steps is None or not self.training:
            return pool.capacity
        return self.over_steps.capacity(context.step, pool.capacity)

    def _top(self, pool: Pool, scores: Tensor, context: TokenContext) -> Tensor:
        """(n,) bool: the top-k of every scope of a pool, by scores (n, 1)."""
        counts = pool.row_counts(context)
        scopes = counts if self.scope == "row" else (sum(counts),)
        index = expert_choice(scores, scopes, self._share(pool, context), context)
        return membership(index, scores.shape[0])[:, 0]

    def _static_counts(self, context: TokenContext) -> Kept | None:
        """Tokens that top-k keeps of each row and modality, where that does not depend on the data: every modality has
        a capacity of its own, and the scope is a row."""
        if self.blind or (self.scope != "row" and context.shape[0] > 1):
            return None
        shares = [Fraction(1)] * self.modalities
        for pool in self.pools:
            shares[pool.modality] = self._share(pool, context)
        return Kept(tuple(tuple(map(capacity_count, row, shares)) for row in context.counts))

    def _report(self, logits: Tensor | None, taken: Tensor, context: TokenContext, inner: TokenContext) -> None:
        """Tell the trace the load, and train the auxiliary router on what was decided."""
        if context.trace is None:
            return
        context.trace.add_load(self.name, sum(inner.row_counts), sum(context.row_counts))
        for pool in self.pools:
            if pool.modality is not None:
                context.trace.add_load(pool.name, inner.totals[pool.modality], context.totals[pool.modality])
        if context.routing != CAUSAL and logits is not None:
            sizes = list(self._candidates(context)[1])
            decisions = zip(self.pools, logits.split(sizes), taken.unsqueeze(-1).split(sizes), strict=True)
            for pool, predicted, chosen in decisions:
                train_auxiliary(context, pool.name, predicted, chosen)

    def init_state(self, rows: int, length: int, like: Tensor) -> State | None:
        return self.block.init_state(rows, length, like)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """The block for the share of each modality that enters it, and its kept length for attention; the routers for
        those that compete.

        Shares are those of `load`, or this layer's final capacity: what it ends at after a step schedule. The nominal
        kept length, where modalities differ, is that of rows with as much of each.
        """
        load = load or {}
        if not self.pools:
            return self.block.cost(length, load)
        share = load.get(self.name, float(self.capacity))
        shares, competes = [share if self.blind else 1.0] * self.modalities, [float(self.blind)] * self.modalities
        for pool in self.pools:
            if pool.modality is not None:
                shares[pool.modality], competes[pool.modality] = load.get(pool.name, float(pool.capacity)), 1.0
        main, stand_in = self.router.weight.numel(), 0 if self.auxiliary is None else self.auxiliary.weights
        routers = Cost.of(router=2.0 * main, active=main) + Cost.of(auxiliary=2.0 * stand_in, active=stand_in)
        return self.block.cost(share * length, load).scaled(*shares) + routers.scaled(*competes)
