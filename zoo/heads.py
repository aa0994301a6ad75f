"""Heads: from the last layer to a prediction of what a position carries, and how far off it is.

All modalities that carry ids share one head, the logits of the vocabulary. One that carries vectors or channels has a
head of its own. Where a head is read (at the position before, as next-token prediction does, or at the position itself,
as denoising does) the objective says.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.carries import Carries, Channels, Ids, Vectors
from zoo.cross_entropy import TokenLosses, linear_losses
from zoo.flops import Cost
from zoo.layers import Linear
from zoo.registry import BlockConfig, Place, register
from zoo.roles import Role
from zoo.slots import Head


class HeadConfig(BlockConfig):
    """Base of the configs of heads."""

    open_ended: bool = False
    """An item may end after any of its positions, so the head of the ids learns at each whether another follows."""

    @property
    def carries(self) -> Carries | None:
        """What the positions that the head predicts carry; None: ids, however many."""
        raise NotImplementedError(f"{type(self).__qualname__} does not say what it predicts")

    def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """How far a prediction is off.

        Args:
            prediction: (n, …) as the head gives it.
            target: (n, …) what the positions carry.
        Returns:
            (n,) at least fp32, joined to the graph where n is 0 as well.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no loss(prediction, target)")


def wide(x: Tensor) -> Tensor:
    """At least fp32: what losses are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@register("head", "ids")
class IdHead(Linear, Head):
    """Logits of every id of the vocabulary."""

    class Config(HeadConfig):
        """The vocabulary says how many ids there are."""

        @property
        def carries(self) -> None:
            return None

        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            """Cross-entropy in nats; prediction (n, V), target (n,)."""
            return F.cross_entropy(wide(prediction), target, reduction="none")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(place.d_model, place.vocab_size, role=Role.HEAD)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, target: Tensor, log_z: bool = True) -> TokenLosses: ...
    def forward(self, x: Tensor, target: Tensor | None = None, log_z: bool = True) -> Tensor | TokenLosses:
        """x (…, D) → logits (…, V); with `target` (…), ids or negative where there is none, what is lost instead."""
        return super().forward(x) if target is None else linear_losses(x, self.weight, target, log_z)

    def cost(self) -> Cost:
        return Cost.matmul(self.weight.numel())


@register("head", "vectors")
class VectorHead(Linear, Head):
    """A linear map to a vector."""

    class Config(HeadConfig):
        width: int = Field(gt=0)
        """Numbers of a vector."""

        @property
        def carries(self) -> Vectors:
            return Vectors(self.width)

        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            """Squared error, a mean over the numbers of a vector; both (n, width)."""
            return (wide(prediction) - target).square().mean(-1)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(place.d_model, config.width, role=Role.HEAD)

    def cost(self) -> Cost:
        return Cost.matmul(self.weight.numel())


@register("head", "channels")
class ChannelHead(Linear, Head):
    """Logits of the ids of every channel."""

    class Config(HeadConfig):
        count: int = Field(gt=0)
        """Channels of a position."""
        size: int = Field(gt=0)
        """Ids of a channel."""

        @property
        def carries(self) -> Channels:
            return Channels(self.count, self.size)

        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            """Cross-entropy in nats, a mean over channels; prediction (n, count, size), target (n, count)."""
            logits = wide(prediction).reshape(-1, self.size)
            losses = F.cross_entropy(logits, target.reshape(-1), reduction="none")
            return losses.view(-1, self.count).mean(-1)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(place.d_model, config.count * config.size, role=Role.HEAD)
        self.shape = (config.count, config.size)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, D) → (n, count, size)."""
        return super().forward(x).unflatten(-1, self.shape)

    def cost(self) -> Cost:
        return Cost.matmul(self.weight.numel())


def default_head(carries: Carries, open_ended: bool) -> HeadConfig:
    """The head of positions that carry something, unless the recipe says another."""
    match carries:
        case Ids():
            return IdHead.Config()
        case Vectors(width):
            return VectorHead.Config(width=width, open_ended=open_ended)
        case Channels(count, size):
            return ChannelHead.Config(count=count, size=size, open_ended=open_ended)
