"""Scoring, selection and the causal stand-in: how tokens are sent to experts and through layers.

A router scores every token in fp32. Expert choice takes the top-k of a *scope*, which looks at the future; an auxiliary
router, trained beside it on detached inputs, learns to predict that decision token by token, for causal use.
Sources: MoMa (arXiv 2407.21770 §2.2–2.4), Mixture-of-Depths (arXiv 2404.02258 §3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import noise
from zoo.context import TokenContext
from zoo.registry import BlockConfig, Place, register

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
    def of_membership(cls, chosen: Tensor) -> Route:
        """From (n, E) bool. How many tokens each expert has depends on the data: copied to the host here, once."""
        expert, token = chosen.T.nonzero(as_tuple=True)
        return cls(token, expert, tuple(chosen.sum(0).tolist()))


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The tokens that one group of experts may have."""

    counts: tuple[int, ...]
    """Tokens of each row."""
    share: Fraction
    """Capacity: how much of a scope one expert takes."""
    scope: Scope
    key: Tensor
    """(n,) int32 noise identities."""
    context: TokenContext


class Router(nn.Module):
    """Base of what stands in a router slot: scores tokens, chooses among them, and weighs what was chosen.

    Built as `cls(config, place, outputs)`. A subclass gives `forward`, and overrides the rest where it differs.
    """

    looks_ahead = True
    """Whether its choice depends on other tokens: then causal use needs an auxiliary router."""

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

    def observe(self, x: Tensor, scores: Tensor, route: Route, name: str, context: TokenContext) -> None:
        """Give the trace what the router's own training needs besides gradients: penalties, statistics."""


@register("router", "linear")
class LinearRouter(Router):
    """scores = activation(x W), in fp32 whatever the model's precision; weights start small. Chooses by expert choice.

    Sigmoid per expert: a token's weight does not depend on other tokens or experts (MoMa eq. 2).
    """

    class Config(BlockConfig):
        activation: Literal["sigmoid", "raw"] = "sigmoid"
        """"raw" multiplies by the logit itself (Mixture-of-Depths eq. 1); "sigmoid" bounds it (MoMa)."""
        noise: Literal["none", "gumbel"] = "none"
        """"gumbel" adds the difference of two Gumbel draws to the logit in training, before selection and weight
        (Gumbel-sigmoid, MoMa eq. 5): it lets copies of one expert, after upcycling, part ways."""
        initial_scale: float = pydantic.Field(0.1, ge=0)
        """Standard deviation of the first weights in units of 1/√d_model."""

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        super().__init__()
        self.activation, self.noise, self.scale = config.activation, config.noise, config.initial_scale
        self.weight = nn.Parameter(torch.empty(outputs, place.d_model))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, self.scale * parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor, key: Tensor | None = None, salt: int = 0) -> Tensor:
        """x (n, D) → scores (n, outputs), fp32 (float64 for a float64 model)."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        if self.noise == "gumbel" and self.training and key is not None:
            logits = logits + noise.logistic(key, salt, logits.shape[-1]).to(wide)
        return logits.sigmoid() if self.activation == "sigmoid" else logits


class AuxiliaryRouter(nn.Module):
    """SiLU(x W₁) W₂ with W₁ (D, D/2): predicts, from one token alone, what the top-k of the scope decides (MoMa §2.4).

    Its input is detached: training it never moves the main model.
    """

    def __init__(self, place: Place, outputs: int) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(max(1, place.d_model // 2), place.d_model))
        self.w_out = nn.Parameter(torch.empty(outputs, max(1, place.d_model // 2)))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) → logits (..., outputs); above 0 means yes."""
        return F.linear(F.silu(F.linear(x.detach(), self.w_in)), self.w_out).float()

    @property
    def weights(self) -> int:
        return self.w_in.numel() + self.w_out.numel()


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


def train_auxiliary(context: TokenContext, name: str, logits: Tensor, chosen: Tensor) -> None:
    """Give the trace the auxiliary router's loss and hit statistics.

    Args:
        logits: (n, E) of the auxiliary router.
        chosen: (n, E) bool, the realised top-k membership (the target).
    """
    if context.trace is None:
        return
    loss = F.binary_cross_entropy_with_logits(logits, chosen.to(logits.dtype), reduction="sum")
    context.trace.add_loss(name, loss, logits.shape[0])
    said = logits.detach() > 0
    context.trace.add_statistics(
        name,
        {
            "total": torch.tensor(float(chosen.numel())),
            "chosen": chosen.sum().float(),
            "said": said.sum().float(),
            "both": (said & chosen).sum().float(),
        },
    )


def record_load(context: TokenContext, name: str, taken: int, offered: int) -> None:
    """Tell the trace how many of the token–expert pairs offered were taken; both are known on the host."""
    if context.trace is not None:
        context.trace.add_statistics(
            f"{name}/load", {"taken": torch.tensor(float(taken)), "offered": torch.tensor(float(offered))}
        )


def loads(statistics: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Share of its tokens that each routed block took, by name, from summed statistics; for `Model.cost`."""
    return {
        name.removesuffix("/load"): sums["taken"] / sums["offered"]
        for name, sums in statistics.items()
        if name.endswith("/load") and sums["offered"]
    }


def rates(sums: dict[str, float]) -> dict[str, float]:
    """Accuracy, precision, recall of an auxiliary router and the accuracy of always saying no, from summed hits."""
    total, chosen, said, both = (float(sums[key]) for key in ("total", "chosen", "said", "both"))
    if total == 0:
        return {}
    wrong = (said - both) + (chosen - both)
    return {
        "accuracy": 1 - wrong / total,
        "precision": both / said if said else 1.0,
        "recall": both / chosen if chosen else 1.0,
        "always_skip": 1 - chosen / total,
    }
