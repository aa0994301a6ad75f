"""Modality-untied layers: a linear map or a norm whose weights are picked by each token's modality.

The one mechanism behind Mixture-of-Transformers, Mixture-of-Mamba and untied feed-forwards. A block sorts its tokens by
group once (`split`), runs everything pointwise on the sorted rows, where each group is one contiguous slice, and goes
back to time order (`merge`) only where tokens meet. Tied weights are the case of one group, in which nothing is sorted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zoo.config import ConfigError, suggestion
from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.gather import exchange
from zoo.host import send
from zoo.layers import RMSNorm
from zoo.roles import ParameterOwner, Role

Towers = list[list[str]]
"""Which modalities share their untied weights: `[[text, image], [speech]]`. Default: each has its own."""


def check_towers(towers: Towers | None, modalities: Sequence[str], path: str, untied: str | None = None) -> None:
    """Every modality stands in exactly one tower.

    Args:
        path: dotted key of the towers.
        untied: dotted key that would untie something, where nothing is.
    Raises:
        ConfigError: an unknown, repeated or missing modality, or nothing for towers to share.
    """
    if towers is not None and untied:
        raise ConfigError(f"{path}: nothing is untied, so there is nothing to share; set {untied}, or remove towers")
    named = [name for tower in towers or [] for name in tower]
    for name in named:
        if name not in modalities:
            raise ConfigError(
                f"{path}: unknown modality {name!r}; model.modalities are {', '.join(modalities)}"
                f"{suggestion(name, modalities)}"
            )
        if named.count(name) > 1:
            raise ConfigError(f"{path}: {name!r} stands in two towers; a modality has one")
    if towers is not None and not all(towers):
        raise ConfigError(f"{path}: {towers} has an empty tower; remove it")
    missing = [name for name in modalities if name not in named]
    if towers is not None and missing:
        raise ConfigError(f"{path}: {', '.join(missing)} in no tower; every modality needs one")


@dataclasses.dataclass(frozen=True)
class Grouping:
    """Which modalities share weights, and the order of rows sorted by those who do.

    With one group weights are tied: "rows" are then the tokens (B, T, …) as they stand, padding included, and nothing
    is moved.
    """

    group: tuple[int, ...] = ()
    """group[m] of modality m, from 0, every number up to the largest used; empty: all are in one group."""

    @classmethod
    def of(cls, modalities: Sequence[str], towers: Towers | None = None, untied: bool = True) -> Grouping:
        """One group a tower; without towers one a modality; one in all where nothing is untied."""
        if not untied:
            return TIED
        if towers is None:
            return cls(tuple(range(len(modalities))))
        return cls(tuple(next(g for g, tower in enumerate(towers) if name in tower) for name in modalities))

    @property
    def count(self) -> int:
        return max(self.group, default=0) + 1

    @property
    def tied(self) -> bool:
        return self.count == 1

    def sizes(self, context: TokenContext) -> tuple[int, ...]:
        """Rows of each group, known on the host."""
        if self.tied:
            return (context.modality.numel(),)
        return tuple(
            sum(n for g, n in zip(self.group, context.totals, strict=True) if g == group) for group in range(self.count)
        )

    def group_of_token(self, context: TokenContext) -> Tensor | None:
        """(B, T) group of each token, padding counts as group 0; None where there is one group."""
        if self.tied:
            return None

        def compute() -> Tensor:
            device = context.modality.device
            table = context.constant(("groups", self.group), lambda: send(self.group, device))
            return table[context.modality.clamp_min(0)]

        return context.shared(("group of token", self.group), compute)

    def _orders(self, context: TokenContext) -> tuple[Tensor, Tensor]:
        """(n,) flat token index of each sorted row; (B·T,) sorted row of each token, past the end for padding."""

        def compute() -> tuple[Tensor, Tensor]:
            parts = [
                torch.cat([context.index(m) for m, g in enumerate(self.group) if g == group])
                for group in range(self.count)
            ]
            order = torch.cat(parts)
            inverse = order.new_full((context.modality.numel(),), order.numel())
            inverse[order] = torch.arange(order.numel(), device=order.device)
            return order, inverse

        return context.shared(("grouping", self.group), compute)

    def split(self, x: Tensor, context: TokenContext) -> Tensor:
        """x (B, T, …) → (n, …): the tokens that are not padding, sorted by group, in row and time order within each.

        With one group x itself.
        """
        if self.tied:
            return x
        order, inverse = self._orders(context)
        flat = x.reshape(context.modality.numel(), -1)
        return exchange(flat, order, inverse, inverse_gaps=context.padded).view(-1, *x.shape[2:])

    def merge(self, rows: Tensor, context: TokenContext) -> Tensor:
        """The inverse of `split`: (n, …) → (B, T, …), 0 at padding."""
        y = self.unsort(rows, context)
        if self.tied and context.padded:
            return y.masked_fill(~context.valid.view(*context.shape, *[1] * (y.dim() - 2)), 0.0)
        return y

    def unsort(self, rows: Tensor, context: TokenContext) -> Tensor:
        """As `merge`, for rows that nobody reads at padding, or that are 0 there: with one group they are left
        there."""
        if self.tied:
            return rows
        order, inverse = self._orders(context)
        flat = exchange(rows.flatten(1), inverse, order, gaps=context.padded)
        return flat.view(*context.shape, *rows.shape[1:])


TIED = Grouping()
"""All modalities share the weights."""


class _GroupedLinear(torch.autograd.Function):
    """One product a group, written where it belongs: neither the parts nor their gradients are copied together."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """rows (n, d_in) sorted by group, weight (groups, d_out, d_in) → (n, d_out)."""
        ctx.save_for_backward(rows, weight)
        ctx.sizes = sizes
        y = rows.new_empty(rows.shape[0], weight.shape[1])
        for part, w, out in zip(rows.split(sizes), weight, y.split(sizes), strict=True):
            torch.mm(part, w.T, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyrefly: ignore[bad-override]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = torch.empty_like(rows, memory_format=torch.contiguous_format)
            for part, w, out in zip(dy.split(ctx.sizes), weight, d_rows.split(ctx.sizes), strict=True):
                torch.mm(part, w, out=out)
        if ctx.needs_input_grad[1]:
            d_weight = torch.empty_like(weight)
            for part, x, out in zip(dy.split(ctx.sizes), rows.split(ctx.sizes), d_weight, strict=True):
                torch.mm(part.T, x, out=out)
        return d_rows, d_weight, None


class _GroupedBias(torch.autograd.Function):
    """One sum a group, written where it belongs; the bias's gradient is a sum over a slice, with no indices to sort."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
        ctx.sizes = sizes
        y = rows.new_empty(rows.shape)
        for part, row, out in zip(rows.split(sizes), bias, y.split(sizes), strict=True):
            torch.add(part, row, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:  # pyrefly: ignore[bad-override]
        d_bias = torch.stack([part.sum(0) for part in dy.split(ctx.sizes)]) if ctx.needs_input_grad[1] else None
        return dy, d_bias, None


def grouped_bias(rows: Tensor, bias: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """rows (n, W) sorted by group, `sizes` of each, + bias (groups, W) of the same dtype → (n, W)."""
    return _GroupedBias.apply(rows, bias, sizes)


class ModalityLinear(ParameterOwner, nn.Linear):
    """y = x W_gᵀ with W_g of the token's group; no bias. It is a linear layer of torch to those who look for such: an
    adapter of PEFT is shared by all groups.

    Args:
        groups: number of weights; 1 is an ordinary tied linear map.
        scale: standard deviation of the first weights in units of 1/√d_in; each group is drawn for itself.
    """

    def __init__(self, d_in: int, d_out: int, groups: int = 1, scale: float = 1.0) -> None:
        nn.Module.__init__(self)  # torch's own would draw first values
        self.in_features, self.out_features, self.bias = d_in, d_out, None
        self.groups, self.scale = groups, scale
        self.roles = {"weight": Role.MATRIX if groups == 1 else Role.MODALITY_MATRIX}
        shape = (d_out, d_in) if groups == 1 else (groups, d_out, d_in)
        self.weight = nn.Parameter(torch.empty(shape))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, self.scale * parameter.shape[-1] ** -0.5, generator=generator)

    def forward(  # pyrefly: ignore[bad-override]  # rows come with their groups
        self, rows: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """rows (n, d_in) sorted by group, `sizes` of each → (n, d_out). Tied weights take rows of any order."""
        if self.groups == 1:
            return F.linear(rows, self.weight)
        return _GroupedLinear.apply(rows, self.weight, tuple(sizes))

    def cost(self) -> Cost:
        """A token meets one group's weights."""
        return Cost.matmul(self.weight.shape[-1] * self.weight.shape[-2])


class ModalityNorm(RMSNorm):
    """RMSNorm of rows that are sorted by group, with a gain of each group."""

    def forward(  # pyrefly: ignore[bad-override]  # rows come with their groups
        self, rows: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        """rows (n, …, width) sorted by group, `sizes` of each → (n, …, width). One gain takes rows of any order."""
        if self.groups == 1:
            return super().forward(rows)
        parts = zip(rows.split(list(sizes)), self.weight.unbind(0), strict=True)
        return torch.cat([F.rms_norm(part, (self.width,), gain, self.eps) for part, gain in parts])
