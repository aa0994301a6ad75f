"""Which tokens a routed layer keeps, and the router that says so.

Selection is the zoo's expert choice with one expert and the groups as pools: fp32 logits (never the gate, which
saturates and ties), k = ⌈n · capacity⌉ of each group in exact arithmetic, ties to the earlier token.
"""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.registry import Place
from zoo.roles import Role
from zoo.routing.candidates import Candidates
from zoo.routing.capacity import capacity_count
from zoo.routing.chooser import ExpertChoice, Threshold
from zoo.routing.linear import LinearScorer
from zoo.routing.selection import TokenSelection


class ModRouter(LinearScorer, counter_noise=True):
    """The linear scorer of routed layers. It ranks tokens by one logit, the log-odds of keeping, in fp32.

    Under softmax there are two scores, skip and keep, as γ-MoD has them; their difference is the logit.
    """

    roles = {"weight": Role.ADDED_ROUTER, "bias": Role.ADDED_ROUTER}

    def __init__(self, config: AdaptConfig, d_model: int) -> None:
        softmax = config.gate.activation == "softmax"
        linear = LinearScorer.Config(
            activation="raw" if config.gate.activation == "none" else config.gate.activation,
            tanh_scale=config.gate.tanh_scale,
            initial_scale=config.router.initial_scale,
        )
        place = Place(d_model, modalities=())  # of a model that is not ours, and tells tokens apart by kind
        super().__init__(linear, place, 2 if softmax else 1)
        self.bias = nn.Parameter(torch.zeros(2 if softmax else 1)) if config.router.bias else None

    @property
    def weights(self) -> int:
        return self.weight.numel()

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            super().initialise(name, parameter, generator)

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        """x (n, D) → scores (n, 1 or 2), fp32 under autocast too, before any activation."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def ranking(self, scores: Tensor) -> Tensor:
        """(n, 1) log-odds of keeping."""
        return (scores[:, 1] - scores[:, 0])[:, None] if scores.shape[1] == 2 else scores

    def gates(self, scores: Tensor) -> Tensor:
        """(n, 1) weights: the activation of the scores."""
        return torch.ones_like(scores[:, :1]) if self.activation == "raw" else self.activate(scores)[:, -1:]


def select(context: AdaptContext, ranking: Tensor, capacity: Fraction, threshold: float | None) -> TokenSelection:
    """Choose among the candidates.

    Args:
        ranking: (n, 1) of the candidates, fp32: log-odds of keeping where there is a threshold.
        capacity: share of each pool.
        threshold: keep-probability above which tokens are kept that do not compete.
    """
    ranking, candidates = ranking.detach(), context.candidates()
    competing, parts = context.competing.shape[0], []
    if competing:
        parts.append(ExpertChoice(capacity).mask(ranking[:competing], candidates)[:, 0])
    counts = list(context.dense_counts)
    for row, size in zip(context.pool_rows, context.pools, strict=True):
        counts[row] += capacity_count(size, capacity)
    by_threshold = context.by_threshold.shape[0] > 0
    if by_threshold:
        assert threshold is not None
        parts.append(Threshold(threshold).mask(ranking[competing:].sigmoid(), candidates)[:, 0])
    taken = torch.cat(parts)
    kept = context.dense.index_copy(0, candidates.index, taken).view(context.shape)
    if by_threshold:
        counts = kept.sum(1).tolist()  # depends on the data: copied to the host, once
    return TokenSelection.of_rows(taken, kept, tuple(counts))
