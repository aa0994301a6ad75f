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
from pydantic import Field
from pydantic_core import PydanticCustomError
from torch import Tensor

from zoo.auxiliary import AuxiliaryRouter, RoutedBlock, train_auxiliary
from zoo.config import ConfigError
from zoo.context import Counts, TokenContext
from zoo.flops import Cost
from zoo.gather import pick
from zoo.registry import BlockConfig, Place, RouterSlot, register
from zoo.routing.candidates import Candidates
from zoo.routing.capacity import Capacity, capacity_count, number
from zoo.routing.chooser import ExpertChoice, Threshold
from zoo.routing.linear import LinearScorer
from zoo.routing.pool import Pool, Scope
from zoo.routing.scorer import Router
from zoo.routing.selection import TokenSelection, decide
from zoo.routing.statistics import Usage
from zoo.schedules import OverLayers, WarmDown
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
class DepthPool(Pool):
    """A pool that one layer chooses from."""

    capacity: Fraction
    """Share that is kept, once a step schedule has ended."""


@dataclasses.dataclass(frozen=True)
class Passed:
    """What a layer decided about the tokens of a batch."""

    selection: TokenSelection
    context: TokenContext
    """Context of the tokens that pass, without a trace: the trace keeps this decision, and a cycle would outlive the
    step."""


@register("depth", "mod")
class MixtureOfDepths(Depth, RoutedBlock, counter_noise=True):
    class Config(BlockConfig):
        capacity: Annotated[float | str | dict[str, float | str], pydantic.BeforeValidator(_one_or_each)] = 0.125
        """Share of a pool's tokens that pass through the block, whatever their modality; or one for each modality,
        `{text: 1.0, image: 0.25}`: each is then chosen among its own tokens, and one at 1.0 does not compete: all its
        tokens pass, ungated."""
        over_layers: OverLayers | None = None
        over_steps: WarmDown | None = None
        scope: Scope = "row"
        """The tokens that compete: those of each row, or of the whole micro-batch."""
        auxiliary: bool = True
        """Train a causal router beside the main one. Without it the block has no causal mode."""
        router: RouterSlot = Field(default_factory=LinearScorer.Config)
        """What scores the tokens; the best of a pool pass through the block."""

        def check(self, place: Place, path: str) -> None:
            if isinstance(self.capacity, dict):
                for modality in self.capacity:
                    place.check_modality(modality, f"{path}.capacity.{modality}")
                for modality in place.modalities:
                    if modality not in self.capacity:
                        raise ConfigError(
                            f"{path}.capacity: no entry for {modality!r}; give every modality its share, 1.0 keeps all"
                        )
            router = self.router.block
            if issubclass(router, Router):
                raise ConfigError(
                    f"{path}.router.type: {self.router.type_name!r} chooses by itself, experts for tokens; here the "
                    "tokens with the best scores of a scope pass, and a plain scorer is all that is needed: use linear"
                )
            router.check_depth(self.router, f"{path}.router")

        def pools(self, place: Place) -> tuple[DepthPool, ...]:
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
                    pools.append(DepthPool(name, index, self.scope, capacity))
            return tuple(pools)

    def __init__(self, config: Config, place: Place, block: Component) -> None:
        super().__init__()
        self.name, self.scope, self.over_steps = place.name, config.scope, config.over_steps
        self.modalities = len(place.modalities)
        self.pools = config.pools(place)
        self.looks_ahead, self.auxiliary = bool(self.pools), None
        if self.pools:
            self.router = config.router.block(config.router, place.child("router"), 1)
            if config.auxiliary:
                self.auxiliary = AuxiliaryRouter(place.child("auxiliary"), 1, [pool.name for pool in self.pools])
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
        pools = self._candidates(context)
        candidates, sizes = self._joined(pools), [pool.index.shape[0] for pool in pools]
        everybody = candidates.index.shape[0] == rows * columns and self.blind
        read = flat if everybody else pick(flat, candidates.index)  # (n, D)
        scores = self.router(read, candidates)  # (n, 1)
        logits = None if self.auxiliary is None else self.auxiliary(read, sizes)
        ranking = self.router.ranking(scores).detach()
        passed = decide(context, self.name, lambda: self._select(ranking, logits, candidates, pools, context))
        selection, inner = passed.selection, passed.context.replace(trace=context.trace)
        self._report(logits, selection, sizes, context, inner)
        if state is not None and not any(inner.row_counts) and self._may_skip:
            return x
        flat_index, valid = selection.flat_index, selection.valid
        kept = pick(flat, flat_index).view(rows, -1, width)
        if valid is not None:
            kept = kept.masked_fill(~valid.unsqueeze(-1), 0.0)
        delta = self.block(kept, inner, state) - kept
        weight, ones = self.router.gates(scores), scores.new_ones(rows * columns, 1)  # for those that do not compete
        weight = weight if everybody else ones.index_copy(0, candidates.index, weight)
        weight = pick(weight, flat_index).to(x.dtype)
        if valid is not None:
            weight = weight * valid.reshape(-1, 1)
        return flat.index_add(0, flat_index, weight * delta.reshape(-1, width)).view_as(x)

    @property
    def _may_skip(self) -> bool:
        """Whether the block may be left out of a decoding step in which no token passes: nothing is differentiated, and
        its weights are whole, so that no other rank waits for this one to gather them (ZeRO-3)."""
        return not torch.is_grad_enabled() and all(weight.numel() for weight in self.block.parameters())

    def _candidates(self, context: TokenContext) -> list[Candidates]:
        """Those of each pool."""
        salt = context.salt(self.name)
        return [pool.candidates(context, salt) for pool in self.pools]

    def _joined(self, pools: list[Candidates]) -> Candidates:
        """All of them, pool after pool."""
        if len(pools) == 1:
            return pools[0]
        context, modalities = pools[0].context, tuple(pool.modality for pool in self.pools)
        index = context.shared(("depth candidates", modalities), lambda: torch.cat([pool.index for pool in pools]))
        rows = tuple(sum(counts) for counts in zip(*(pool.row_counts for pool in pools), strict=True))
        scopes = tuple(size for pool in pools for size in pool.scopes)
        return Candidates(context, index, rows, scopes, salt=pools[0].salt)

    def _select(
        self,
        ranking: Tensor,
        logits: Tensor | None,
        candidates: Candidates,
        pools: list[Candidates],
        context: TokenContext,
    ) -> Passed:
        """Choose among the candidates: by the auxiliary router's logits in causal use, else the best of each pool.

        Args:
            ranking, logits: (n, 1).
            pools: the candidates of each pool.
        """
        row_counts = counts = None
        if self.decided_by_auxiliary(context):
            assert logits is not None
            taken = Threshold().mask(logits.detach(), candidates)[:, 0]
        else:
            parts = zip(self.pools, pools, ranking.split([pool.index.shape[0] for pool in pools]), strict=True)
            best = [ExpertChoice(self._capacity(pool, context)).mask(part, members) for pool, members, part in parts]
            taken = torch.cat(best)[:, 0]
            row_counts, counts = self._static_counts(context)
        # everybody but padding and the candidates that were not taken
        kept = context.valid.reshape(-1).index_copy(0, candidates.index, taken).view(context.shape)
        left = context.kept(kept, row_counts, counts)
        # the block runs even when nothing is kept: every rank uses every parameter
        selection = TokenSelection.of_rows(taken, kept, left.row_counts, least=1)
        return Passed(selection, context.replace(trace=None).select(selection.index, selection.valid, left))

    def _capacity(self, pool: DepthPool, context: TokenContext) -> Fraction:
        """Capacity of a pool at the context's step."""
        if self.over_steps is None or not self.training:
            return pool.capacity
        return self.over_steps.capacity(context.step, pool.capacity)

    def _static_counts(self, context: TokenContext) -> tuple[tuple[int, ...] | None, Counts | None]:
        """Tokens that top-k keeps of each row, and of each row and modality, where those do not depend on the data: the
        scope is a row, and for the latter every modality has a capacity of its own."""
        if self.scope != "row" and context.shape[0] > 1:
            return None, None
        if self.blind:
            capacity = self._capacity(self.pools[0], context)
            return tuple(capacity_count(n, capacity) for n in context.row_counts), None
        capacities = [Fraction(1)] * self.modalities
        for pool in self.pools:
            assert pool.modality is not None
            capacities[pool.modality] = self._capacity(pool, context)
        counts = tuple(tuple(map(capacity_count, row, capacities)) for row in context.counts)
        return tuple(map(sum, counts)), counts

    def _report(
        self,
        logits: Tensor | None,
        selection: TokenSelection,
        sizes: list[int],
        context: TokenContext,
        inner: TokenContext,
    ) -> None:
        """Tell the trace the load, and train the auxiliary router on what was decided; `sizes` of the pools."""
        if context.trace is None:
            return
        context.trace.add_load(self.name, sum(inner.row_counts), sum(context.row_counts))
        context.trace.add_usage(self.name, lambda: Usage(inner.totals, context.totals))
        for pool in self.pools:
            if pool.modality is not None:
                context.trace.add_load(pool.name, inner.totals[pool.modality], context.totals[pool.modality])
        if logits is not None and not self.decided_by_auxiliary(context):
            decisions = zip(self.pools, logits.split(sizes), selection.taken.unsqueeze(-1).split(sizes), strict=True)
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
        main, stand_in = self.router.weights, 0 if self.auxiliary is None else self.auxiliary.weights
        routers = Cost.of(router=2.0 * main, active=main) + Cost.of(auxiliary=2.0 * stand_in, active=stand_in)
        return self.block.cost(share * length, load).scaled(*shares) + routers.scaled(*competes)
