"""Routed experts: groups of feed-forwards of which each token meets some.

The shared mechanism of `experts` (one group over all tokens) and `moma` (one group a modality). The router decides who
chooses: experts their tokens (`linear`: as many FLOPs as one dense feed-forward), or tokens their experts
(`token_choice`, `mixer`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo import kernels
from zoo.auxiliary import AuxiliaryRouter, RoutedBlock, train_auxiliary
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.feedforward import Dense
from zoo.flops import Cost
from zoo.gather import pick
from zoo.kernels import grouped
from zoo.layers import RMSNorm
from zoo.registry import BlockConfig, Place, RouterSlot, register
from zoo.roles import ParameterOwner, Role
from zoo.routing.candidates import Candidates
from zoo.routing.capacity import Capacity, number
from zoo.routing.chooser import Chooser, ExpertChoice, Threshold
from zoo.routing.linear import LinearScorer
from zoo.routing.pool import Pool, Scope
from zoo.routing.scorer import Router
from zoo.routing.selection import ExpertSelection, decide
from zoo.routing.statistics import Usage
from zoo.slots import FeedForward
from zoo.states import State


class ExpertConfig(BlockConfig):
    """What every feed-forward of routed experts can be told."""

    d_ff: int = Field(gt=0)
    """Hidden width F of one expert."""
    capacity: Capacity | None = None
    """Expert choice: share of its pool's tokens an expert takes; default 1 / experts, no-op experts included: without
    those the cost of one dense feed-forward."""
    scope: Scope = "microbatch"
    """Expert choice: the tokens that compete."""
    shared_experts: int = Field(0, ge=0)
    """Experts that every token meets besides, ungated: one SwiGLU of so many times d_ff (DeepSeekMoE, arXiv 2401.06066
    §3.2); under `moma` one a modality."""
    noop_experts: int = Field(0, ge=0)
    """Experts of each group that do nothing: a token that goes there passes by on the residual, for free ("integrated"
    MoDE, arXiv 2404.02258). Each has a column in the router; scores must compete: token_choice, or activation: softmax.
    """
    gate: Literal["outside", "inside"] = "outside"
    """With post-norm: Σ G · N(FFN(x)), or N(Σ G · FFN(x)) as published, which cancels the gate of a token with a single
    expert. No difference with pre-norm."""
    auxiliary: bool = True
    """Train a causal router beside the main one. Without it the block has no causal mode."""
    router: RouterSlot = Field(default_factory=LinearScorer.Config)
    """What scores the tokens; one that brings a chooser of its own also decides."""

    def chooser(self, experts: int) -> ExpertChoice:
        """How the experts of a group of `experts` choose, unless the router has its own way."""
        capacity = Fraction(1, experts + self.noop_experts) if self.capacity is None else number(self.capacity)
        return ExpertChoice(capacity)

    @property
    def shared_by_modality(self) -> bool:
        """Whether the shared experts are one network a modality."""
        return False

    def group_sizes(self) -> dict[str, int]:
        """Experts of each group by name."""
        raise NotImplementedError

    def check(self, place: Place, path: str) -> None:
        router = self.router.block
        if issubclass(router, Router):
            for key, plain in (("capacity", None), ("scope", "microbatch")):
                if getattr(self, key) != plain:
                    raise ConfigError(
                        f"{path}.{key}: {getattr(self, key)!r}; under router {self.router.type_name!r} each token "
                        f"chooses for itself and none is dropped: remove {key}, or choose type: linear"
                    )
        for experts in self.group_sizes().values():
            router.check_experts(self.router, experts, self.noop_experts, f"{path}.router")


class StackedSwiGLU(ParameterOwner):
    """E SwiGLU experts of one shape, their weights stacked: every rank touches all of them, whatever its tokens."""

    roles = {"w_in": Role.EXPERT_MATRIX, "w_out": Role.EXPERT_MATRIX}

    def __init__(self, experts: int, d_ff: int, place: Place) -> None:
        super().__init__()
        self.out_scale = (2 * place.layers) ** -0.5
        self.w_in = nn.Parameter(torch.empty(experts, place.d_model, 2 * d_ff))
        self.w_out = nn.Parameter(torch.empty(experts, d_ff, place.d_model))
        self.kernel = kernels.choose("experts", place.kernels.get("experts", "auto")).module

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        scale = self.out_scale if name == "w_out" else 1.0
        parameter.normal_(0.0, scale * parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor, selection: ExpertSelection) -> Tensor:
        """x (R, D), rows of the pairs of `selection` → (R, D)."""
        if selection.ends is not None and self.kernel is grouped and grouped.takes_ends(x, self.w_in, self.w_out):
            return grouped.swiglu_by_ends(x, selection.ends, self.w_in, self.w_out)
        return self.kernel.grouped_swiglu(x, selection.counts, self.w_in, self.w_out)


@dataclasses.dataclass
class GroupStates:
    """Decoding states of the groups whose routers have one, by name."""

    states: dict[str, State]

    def clone(self) -> GroupStates:
        return GroupStates({name: state.clone() for name, state in self.states.items()})

    def reorder(self, index: Tensor) -> None:
        for state in self.states.values():
            state.reorder(index)


@dataclasses.dataclass(frozen=True)
class Routed:
    """What a group does with its tokens."""

    selection: ExpertSelection
    """Without no-op experts."""
    weight: Tensor
    """(R,) of each pair, fp32."""


class ExpertGroup(nn.Module, RoutedBlock):
    """A pool of tokens with its router, the router's causal stand-in, and the experts."""

    def __init__(self, pool: Pool, experts: int, config: ExpertConfig, place: Place) -> None:
        super().__init__()
        self.name, self.pool, self.count = place.name, pool, experts
        self.router = config.router.block(config.router, place.child("router"), experts + config.noop_experts)
        own = isinstance(self.router, Router)
        self.chooser: Chooser = self.router.chooser if own else config.chooser(experts)
        self.looks_ahead = self.chooser.looks_ahead
        needed = config.auxiliary and self.looks_ahead
        self.auxiliary = AuxiliaryRouter(place.child("auxiliary"), experts) if needed else None
        self.experts = StackedSwiGLU(experts, config.d_ff, place.child("experts"))

    def candidates(self, context: TokenContext) -> Candidates:
        return self.pool.candidates(context, context.salt(self.name))

    def route(self, x: Tensor, candidates: Candidates, context: TokenContext, state: State | None = None) -> Routed:
        """Decide who of the candidates x (n, D) goes where."""
        router = self.router
        scores = router(x, candidates) if state is None else router(x, candidates, state)  # (n, E + no-op)
        logits = None if self.auxiliary is None else self.auxiliary(x)
        causal = self.decided_by_auxiliary(context)

        def choose() -> ExpertSelection:
            if causal:
                assert logits is not None
                return Threshold().choose(logits.detach(), candidates)
            return self.chooser.choose(router.ranking(scores).detach(), candidates)

        everywhere = decide(context, self.name, choose)
        selection = everywhere.first(self.count)
        if context.trace is not None:
            context.trace.add_load(self.name, selection.token.shape[0], x.shape[0] * self.count)
            if not self.looks_ahead:
                context.trace.add_expert_load(self.name, tuple(everywhere.sizes(torch.float64).unbind()))
            context.trace.add_usage(self.name, lambda: self._usage(selection, candidates, context))
        if not causal and logits is not None:
            train_auxiliary(context, self.name, logits, selection.mask(x.shape[0]))
        if isinstance(router, Router):
            router.observe(x, scores, everywhere, candidates)
        weight = self.chooser.weigh(router.gates(scores), everywhere)
        return Routed(selection, weight[: selection.token.shape[0]])

    def _usage(self, selection: ExpertSelection, candidates: Candidates, context: TokenContext) -> Usage:
        """Rows of each expert by modality."""
        width = len(context.totals)
        modality = context.modality.reshape(-1).index_select(0, candidates.index.index_select(0, selection.token))
        rows = torch.bincount(selection.expert * width + modality, minlength=self.count * width)
        own = self.pool.modality
        offered = tuple(n if own in (None, m) else 0 for m, n in enumerate(context.totals))
        return Usage(tuple(rows.tolist()), offered)

    def init_state(self, rows: int, like: Tensor) -> State | None:
        """What the router must remember while decoding."""
        return self.router.init_state(rows, like) if isinstance(self.router, Router) else None


class RoutedExperts(FeedForward):
    """Groups of experts over parts of the tokens: gather once, compute, weigh, add once."""

    def __init__(self, modalities: Mapping[str, int | None], config: ExpertConfig, place: Place) -> None:
        """`modalities`: for each group by name the modality whose tokens are its pool; None: all tokens are."""
        super().__init__()
        self.groups = nn.ModuleDict()
        for name, modality in modalities.items():
            inner, experts = place.child(f"groups.{name}"), config.group_sizes()[name]
            self.groups[name] = ExpertGroup(Pool(inner.name, modality, config.scope), experts, config, inner)
        self.modalities = len(place.modalities)
        shared = Dense.Config(d_ff=max(1, config.shared_experts) * config.d_ff, untied=config.shared_by_modality)
        self.shared = Dense(shared, place.child("shared")) if config.shared_experts else None
        self.owns_norm = place.norm == "post" and config.gate == "outside"
        self.norm_grouping = place.norm_grouping
        self.norm = RMSNorm(place.d_model, self.norm_grouping.count) if self.owns_norm else None

    def forward(self, x: Tensor, context: TokenContext, state: GroupStates | None = None) -> Tensor:
        """(B, T, D) → Σ over a token's experts of weight · SwiGLU(x), and its shared experts; 0 at padding."""
        flat = x.reshape(-1, x.shape[-1])
        tokens, weights, selections = [], [], []
        for name, group in self._groups.items():
            candidates = group.candidates(context)
            inner = None if state is None else state.states.get(name)
            routed = group.route(pick(flat, candidates.index), candidates, context, inner)
            tokens.append(candidates.index.index_select(0, routed.selection.token))
            weights.append(routed.weight)
            selections.append(routed.selection)
        token = torch.cat(tokens)
        parts = flat.index_select(0, token).split([part.shape[0] for part in tokens])
        work = zip(self._groups.values(), parts, selections, strict=True)
        y = torch.cat([group.experts(part, selection) for group, part, selection in work])
        group = self.norm_grouping.group_of_token(context)
        if self.norm is not None:
            y = self.norm(y, None if group is None else group.reshape(-1).index_select(0, token))
        y = y * torch.cat(weights).unsqueeze(-1).to(y.dtype)
        total = torch.zeros_like(flat)
        if self.shared is not None:
            total = self.shared(x, context).reshape(flat.shape)
            if self.norm is not None:
                total = self.norm(total, None if group is None else group.reshape(-1))
        return total.index_add(0, token, y).view_as(x)

    @property
    def _groups(self) -> Mapping[str, ExpertGroup]:
        return cast(Mapping[str, ExpertGroup], self.groups)

    def init_state(self, rows: int, length: int, like: Tensor) -> GroupStates | None:
        """What routers must remember while decoding; None where no group's does."""
        states = {name: group.init_state(rows, like) for name, group in self._groups.items()}
        kept = {name: state for name, state in states.items() if state is not None}
        return GroupStates(kept) if kept else None

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        """What a modality pays depends on its group alone: each expert for its share, nominal or as in `load`, no-op
        experts nothing, shared ones whole."""
        norm = 0 if self.norm is None else self.norm.width
        rows = []
        for modality in range(self.modalities):
            group = next(group for group in self._groups.values() if group.pool.modality in (None, modality))
            capacity = (load or {}).get(group.name, float(group.chooser.capacity or 1))
            used = capacity * (group.experts.w_in.numel() + group.experts.w_out.numel())
            router = group.router.weights
            auxiliary = 0 if group.auxiliary is None else group.auxiliary.weights
            rows.append((2.0 * used, used + router + auxiliary + norm, 2.0 * router, 2.0 * auxiliary))
        flops, active, router, auxiliary = zip(*rows, strict=True)
        routed = Cost(flops, active, router, auxiliary)
        return routed if self.shared is None else routed + self.shared.cost(length, load)


@register("feedforward", "experts")
class Experts(RoutedExperts, counter_noise=True):
    """A mixture over all tokens, whatever their modality (arXiv 2202.09368; MoMa's "MoE 8x" baseline)."""

    class Config(ExpertConfig):
        experts: int = Field(gt=0)
        """Number of experts E."""
        untied_shared: bool = False
        """Whether `shared_experts` are one network a modality, which its tokens alone meet, in place of one for all."""

        @property
        def shared_by_modality(self) -> bool:
            return self.untied_shared

        def check(self, place: Place, path: str) -> None:
            if self.untied_shared and not self.shared_experts:
                raise ConfigError(f"{path}.untied_shared: there is nothing to untie; set shared_experts, or remove it")
            super().check(place, path)

        def group_sizes(self) -> dict[str, int]:
            return {"all": self.experts}

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__({"all": None}, config, place)
