"""Which tokens a routed layer keeps, and the router that says so.

Selection is the zoo's expert choice with one expert and the groups as scopes: fp32 logits (never the gate, which
saturates and ties), k = ⌈n · keep⌉ of each group in exact arithmetic, ties to the earlier token.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.adapt.config import AdaptConfig
from zoo.adapt.context import AdaptContext
from zoo.registry import Place
from zoo.roles import Role
from zoo.routers import LinearRouter, capacity_count, expert_choice, membership


class ModRouter(LinearRouter, counter_noise=True):
    """One logit a token, in fp32: the log-odds of keeping it. `gate` turns logits into weights.

    Under softmax there are two outputs, skip and keep, as γ-MoD has them; their difference is the logit.
    """

    roles = {"weight": Role.ADDED_ROUTER, "bias": Role.ADDED_ROUTER}

    def __init__(self, config: AdaptConfig, d_model: int) -> None:
        softmax = config.gate.activation == "softmax"
        linear = LinearRouter.Config(
            activation="raw" if config.gate.activation == "none" else config.gate.activation,
            tanh_scale=config.gate.tanh_scale,
            initial_scale=config.router.initial_scale,
        )
        super().__init__(linear, Place(d_model, ("text", "image")), 2 if softmax else 1)
        self.bias = nn.Parameter(torch.zeros(2 if softmax else 1)) if config.router.bias else None

    @property
    def weights(self) -> int:
        return self.weight.numel()

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            super().initialise(name, parameter, generator)

    def forward(self, x: Tensor, key: Tensor | None = None, salt: int = 0) -> Tensor:
        """x (n, D) → outputs (n, 1 or 2), fp32, before any activation."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide), None if self.bias is None else self.bias.to(wide))

    def logit(self, outputs: Tensor) -> Tensor:
        """(n, 1 or 2) → (n,): log-odds of keeping."""
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]

    def gate(self, outputs: Tensor) -> Tensor:
        """(n, 1 or 2) → (n,) weights."""
        return torch.ones_like(outputs[:, 0]) if self.activation == "raw" else self.activate(outputs)[:, -1]


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a layer keeps of B rows of T tokens."""

    taken: Tensor
    """(n,) bool over the context's candidates."""
    keep: Tensor
    """(B·T,) bool."""
    counts: tuple[int, ...]
    """Tokens kept of each row."""
    index: Tensor
    """(B, K) columns kept, ascending; K is the largest count. Past a row's count: columns that are not kept."""
    valid: Tensor | None
    """(B, K) bool; None: every row keeps K."""


def select(context: AdaptContext, logits: Tensor, keep: Fraction, threshold: float | None) -> Selection:
    """Choose among the candidates.

    Args:
        logits: (n,) of the candidates, fp32.
        keep: share of each group.
        threshold: keep-probability above which judged tokens are kept.
    """
    logits = logits.detach()
    grouped = context.members.shape[0]
    parts = []
    if grouped:
        index = expert_choice(logits[:grouped, None], context.groups, keep, context)
        parts.append(membership(index, grouped)[:, 0])
    counts = list(context.fixed)
    for row, size in zip(context.rows, context.groups, strict=True):
        counts[row] += capacity_count(size, keep)
    if context.judged.shape[0]:
        parts.append(logits[grouped:].sigmoid() > threshold)
    taken = torch.cat(parts)
    kept = context.base.index_copy(0, context.candidates, taken)
    rows = kept.view(context.shape)
    if context.judged.shape[0]:
        counts = rows.sum(1).tolist()  # depends on the data: copied to the host, once
    largest = max(counts)
    index = rows.logical_not().sort(dim=1, stable=True).indices[:, :largest]  # kept columns first, in time order
    valid = None
    if min(counts) < largest:
        totals = torch.tensor(counts, device=kept.device)
        valid = torch.arange(largest, device=kept.device) < totals[:, None]
    return Selection(taken, kept, tuple(counts), index, valid)
