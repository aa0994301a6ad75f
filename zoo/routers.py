"""Scoring and selection: how tokens are sent to experts and through layers.

A router scores every token in fp32. Expert choice takes the top-k of a *scope*, which looks at the future; the causal
stand-in for it is `zoo.auxiliary`.
Sources: MoMa (arXiv 2407.21770 §2.2–2.3), Mixture-of-Depths (arXiv 2404.02258 §3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import noise
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.registry import BlockConfig, Place, register
from zoo.roles import Role
from zoo.slots import Part
from zoo.states import State

Scope = Literal["microbatch", "row"]
"""The set of tokens that compete: the whole micro-batch, or each row for itself."""


def _capacity(value: float | str) -> float | str:
    try:
        exact = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError("must be a number or a fraction such as '1/4'") from None
    if not 0 < exact <= 1:
        raise ValueError("must be above 0 and at most 1")
    return value


Capacity = Annotated[float | str, pydantic.BeforeValidator(_capacity)]
"""Share of a scope's tokens, 0.25 or "1/4"."""


def capacity_count(tokens: int, capacity: Fraction) -> int:
    """k = ⌈tokens · capacity⌉, in exact arithmetic."""
    return math.ceil(tokens * capacity)


@dataclasses.dataclass(frozen=True)
class Route:
    """Which tokens go to which expert of a group, sorted by expert."""

    token: Tensor
    """(R,) index into the group's n tokens."""
    expert: Tensor
    """(R,)."""
    counts: tuple[int, ...]
    """Rows of each expert, on the host."""

    @classmethod
    def of_columns(cls, chosen: Tensor, columns: int) -> Route:
        """From the k columns that each token chose for itself, (n, k). The counts are copied to the host here, once."""
        expert, order = chosen.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(columns, device=expert.device), right=True).tolist()
        token = order.div(chosen.shape[1], rounding_mode="floor")
        return cls(token, expert, tuple(b - a for a, b in zip([0, *ends[:-1]], ends, strict=True)))

    def first(self, experts: int) -> Route:
        """The pairs of the first `experts` columns alone: those of no-op experts, which come last, are dropped."""
        if experts == len(self.counts):
            return self
        kept = sum(self.counts[:experts])
        return Route(self.token[:kept], self.expert[:kept], self.counts[:experts])

    @classmethod
    def of_membership(cls, chosen: Tensor) -> Route:
        """From (n, E) bool. How many tokens each expert has depends on the data: copied to the host here, once."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        return cls(token, expert, tuple(chosen.sum(0).tolist()))


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The tokens that one group of experts may have."""

    member: Tensor
    """(n,) flat indices into B·T, in row and time order."""
    counts: tuple[int, ...]
    """Tokens of each row."""
    share: Fraction
    """Capacity: how much of a scope one expert takes."""
    scope: Scope
    key: Tensor
    """(n,) int32 noise identities."""
    context: TokenContext


class Router(Part):
    """Base of what stands in a router slot: scores tokens, chooses among them, and weighs what was chosen.

    Built as `cls(config, place, outputs)`; the last outputs may be no-op experts. A subclass gives `forward`, and
    overrides the rest where it differs. State that no gradient trains goes into integer buffers, which an engine's cast
    to bf16 leaves alone, and is renewed by an `update(statistics, step)` from what `observe` put into `Trace.updates`.
    """

    looks_ahead = True
    """Whether its choice depends on other tokens: then causal use needs an auxiliary router. A router that does not
    decides token by token, has no capacity and no scope, and drops nothing."""

    @classmethod
    def check_group(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        """Raise `ConfigError` where this router cannot serve a group of `experts` and `noop` no-op experts.

        Args:
            config: of the router.
            path: its dotted key.
        """

    @property
    def weights(self) -> int:
        """Weights that scoring one token meets, for `cost`."""
        return sum(parameter.numel() for parameter in self.parameters())

    def nominal_share(self, capacity: Fraction) -> Fraction:
        """Share of its group's tokens that an expert is meant to get; `capacity` is expert choice's."""
        return capacity

    def init_state(self, rows: int, like: Tensor) -> State | None:
        """What scoring must remember of a document while decoding; None for a router that sees one token alone."""
        return None

    def score(self, x: Tensor, candidates: Candidates, salt: int, state: State | None = None) -> Tensor:
        """`forward`, for a router that needs to know more about the tokens x (n, D) than their values."""
        return self(x, candidates.key, salt)

    def forward(self, x: Tensor, key: Tensor | None = None, salt: int = 0) -> Tensor:
        """x (n, D) → scores (n, outputs), fp32. `key` and `salt` drive noise, where there is any (`zoo.noise`)."""
        raise NotImplementedError

    def choose(self, scores: Tensor, candidates: Candidates) -> Route:
        """Expert choice: each expert's top-k of every scope."""
        scopes = candidates.counts if candidates.scope == "row" else (sum(candidates.counts),)
        index = expert_choice(scores, scopes, candidates.share, candidates.context)  # (E, K)
        expert = torch.arange(index.shape[0], device=scores.device).repeat_interleave(index.shape[1])
        return Route(index.reshape(-1), expert, (index.shape[1],) * index.shape[0])

    def weigh(self, scores: Tensor, route: Route) -> Tensor:
        """(R,) weight of each chosen pair: its score. The path on which the router learns."""
        return scores.reshape(-1).index_select(0, route.token * scores.shape[1] + route.expert)

    def observe(self, x: Tensor, scores: Tensor, route: Route, candidates: Candidates) -> None:
        """Give the trace what the router's own training needs besides gradients: penalties, sums for `update`.

        Args:
            x: (n, D), as scored.
            route: over all outputs, no-op experts included.
        """


@register("router", "linear")
class LinearRouter(Router, counter_noise=True):
    """scores = activation(x W), in fp32 whatever the model's precision; weights start small. Chooses by expert choice.

    Sigmoid per expert: a token's weight does not depend on other tokens or experts (MoMa eq. 2).
    """

    roles = {"weight": Role.ROUTER}

    class Config(BlockConfig):
        activation: Literal["sigmoid", "raw", "softmax", "tanh"] = "sigmoid"
        """"raw" multiplies by the logit itself (Mixture-of-Depths eq. 1); "sigmoid" bounds it (MoMa); "softmax" makes
        the experts compete for a token (expert choice as first published, arXiv 2202.09368 §3.2); "tanh" is
        1 + tanh_scale · tanh(logit), the identity at a logit of 0 (p-MoD's TanhNorm, arXiv 2412.04449)."""
        tanh_scale: float | None = pydantic.Field(None, gt=0)
        """How far a tanh weight may be from 1; default 0.2, p-MoD's."""
        noise: Literal["none", "gumbel"] = "none"
        """"gumbel" adds the difference of two Gumbel draws to the logit in training, before selection and weight
        (Gumbel-sigmoid, MoMa eq. 5): it lets copies of one expert, after upcycling, part ways. Under softmax one draw
        an expert."""
        initial_scale: float = pydantic.Field(0.1, ge=0)
        """Standard deviation of the first weights in units of 1/√d_model."""

        @pydantic.model_validator(mode="after")
        def _scale_of_tanh_alone(self) -> LinearRouter.Config:
            if self.tanh_scale is not None and self.activation != "tanh":
                raise ValueError(
                    f"tanh_scale has no meaning under activation {self.activation!r}; leave it out or choose tanh"
                )
            return self

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        super().__init__()
        self.tanh_scale = 0.2 if config.tanh_scale is None else config.tanh_scale
        self.activation, self.noise = config.activation, config.noise
        self.deviation = config.initial_scale * place.d_model**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, place.d_model))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, self.deviation, generator=generator)

    @classmethod
    def check_group(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        if noop and getattr(config, "activation", "softmax") != "softmax":
            raise ConfigError(
                f"{path}.activation: {config.activation}; a no-op expert works by drawing scores away from the others, "
                "which only softmax does under expert choice: set activation: softmax, or type: token_choice"
            )

    def forward(self, x: Tensor, key: Tensor | None = None, salt: int = 0) -> Tensor:
        """x (n, D) → scores (n, outputs), fp32 (float64 for a float64 model)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        if self.noise == "gumbel" and self.training and key is not None:
            draw = gumbel if self.activation == "softmax" else noise.logistic
            logits = logits + draw(key, salt, logits.shape[-1]).to(wide)
        return self.activate(logits)

    def activate(self, logits: Tensor) -> Tensor:
        """Logits (n, outputs) → scores."""
        if self.activation == "softmax":
            return logits.softmax(-1)
        if self.activation == "tanh":
            return 1 + self.tanh_scale * logits.tanh()
        return logits.sigmoid() if self.activation == "sigmoid" else logits


def gumbel(key: Tensor, salt: int, width: int) -> Tensor:
    """Gumbel draws, a function of (key, salt): (..., width) fp32."""
    return -(-noise.uniform(key, salt, width).log()).log()


def expert_choice(scores: Tensor, counts: tuple[int, ...], capacity: Fraction, context: TokenContext) -> Tensor:
    """Each expert's top-k of every scope.

    Args:
        scores: (n, E), tokens of one scope after the other.
        counts: tokens of each scope; they add up to n.
        capacity: share an expert takes of each scope, k = ⌈count · capacity⌉.
        context: keeps the host-made indices for the other layers.
    Returns:
        (E, K) indices into n, K = Σ k. Ties go to the earlier token.
    """
    order = scores.detach().sort(dim=0, descending=True, stable=True).indices  # (n, E)
    if len(counts) == 1:
        return order[: capacity_count(counts[0], capacity)].T

    def host() -> tuple[Tensor, Tensor]:
        scope = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        starts = [sum(counts[:i]) for i in range(len(counts))]
        taken = [torch.arange(s, s + capacity_count(n, capacity)) for s, n in zip(starts, counts, strict=True)]
        return scope.to(scores.device), torch.cat(taken).to(scores.device)

    scope, taken = context.shared(("expert choice", counts, capacity), host)
    by_scope = scope[order].sort(dim=0, stable=True).indices  # best first inside each scope
    return order.gather(0, by_scope).index_select(0, taken).T


def membership(index: Tensor, tokens: int) -> Tensor:
    """(E, K) chosen indices → (tokens, E) bool."""
    chosen = torch.zeros(index.shape[0], tokens, dtype=torch.bool, device=index.device)
    return chosen.scatter_(1, index, True).T


def decide(context: TokenContext, name: str, decision: Callable[[], Any]) -> Any:
    """A routing decision, recorded in the trace and replayed under activation checkpointing."""
    return decision() if context.trace is None else context.trace.decide(name, decision)
