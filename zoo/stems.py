"""Stems: from what a position carries to the residual stream.

All modalities that carry ids share one stem, the embedding of the vocabulary. One that carries vectors or channels has
a stem of its own, whose output is added to the embedding of the id that holds its places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.carries import Carries, Channels, Ids, Vectors
from zoo.flops import Cost
from zoo.layers import Linear
from zoo.registry import BlockConfig, Place, register
from zoo.roles import Role
from zoo.slots import Stem


class StemConfig(BlockConfig):
    """Base of the configs of stems."""

    @property
    def carries(self) -> Carries | None:
        """What the positions that the stem takes carry; None: ids, however many."""
        raise NotImplementedError(f"{type(self).__qualname__} does not say what its positions carry")


@register("stem", "ids")
class IdStem(Stem):
    """One vector for each id of the vocabulary: the embedding."""

    roles = {"weight": Role.EMBEDDING}

    class Config(StemConfig):
        """No keys: the vocabulary says how many ids there are."""

        @property
        def carries(self) -> None:
            return None

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(place.vocab_size, place.d_model))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (…) ids → (…, D)."""
        return F.embedding(x, self.weight)

    def cost(self) -> Cost:
        """Looked up, not multiplied; counts whole as active."""
        return Cost.of(active=self.weight.numel())


@register("stem", "vectors")
class VectorStem(Linear, Stem):
    """A linear map of vectors: patches of a picture, points of a pen."""

    class Config(StemConfig):
        width: int = Field(gt=0)
        """Numbers of a vector."""

        @property
        def carries(self) -> Vectors:
            return Vectors(self.width)

    def __init__(self, config: Config, place: Place) -> None:
        # as large as the embedding of an id where the numbers of a vector are about 1
        super().__init__(config.width, place.d_model, scale=place.d_model**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, width) → (n, D)."""
        return F.linear(x.to(self.weight.dtype), self.weight)

    def cost(self) -> Cost:
        return Cost.matmul(self.weight.numel())


@register("stem", "channels")
class ChannelStem(Stem):
    """The sum of one embedding a channel."""

    roles = {"weight": Role.EMBEDDING}

    class Config(StemConfig):
        count: int = Field(gt=0)
        """Channels of a position."""
        size: int = Field(gt=0)
        """Ids of a channel."""

        @property
        def carries(self) -> Channels:
            return Channels(self.count, self.size)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.count, self.size = config.count, config.size
        self.weight = nn.Parameter(torch.empty(config.count * config.size, place.d_model))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        # the sum over channels is as large as the embedding of an id
        parameter.normal_(0.0, (parameter.shape[1] * self.count) ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (n, count) ids, each in [0, size) → (n, D)."""
        first = torch.arange(self.count, device=x.device) * self.size
        return F.embedding_bag(x + first, self.weight, mode="sum")

    def cost(self) -> Cost:
        """Looked up, not multiplied; a position meets one row a channel."""
        return Cost.of(active=self.weight.numel() / self.size)


def default_stem(carries: Carries) -> StemConfig:
    """The stem of positions that carry something, unless the recipe says another."""
    match carries:
        case Ids():
            return IdStem.Config()
        case Vectors(width):
            return VectorStem.Config(width=width)
        case Channels(count, size):
            return ChannelStem.Config(count=count, size=size)
