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
from zoo.slots import Stem, TimedStem


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


FREQUENCIES = 128
"""How many sines, and how many cosines, tell a time."""
SHORTEST = 1e4
"""Ratio of the longest wavelength of a time's sines to the shortest."""


@register("stem", "noisy_vectors")
class NoisyVectorStem(TimedStem):
    """A linear map of vectors that noise is mixed into, and of the time that says how much: W x + E s(t).

    s(t) are sines and cosines of 1000 t (arXiv 2006.11239 §B). Transfusion (arXiv 2408.11039 §4.1) adds the embedding
    of the time to a patch before the linear map, which leaves it only as many dimensions as the patch has numbers; here
    it is added after it, as in BAGEL (arXiv 2505.14683).
    """

    roles = {"weight": Role.MATRIX, "time": Role.MATRIX}

    class Config(StemConfig):
        width: int = Field(gt=0)
        """Numbers of a vector."""

        @property
        def carries(self) -> Vectors:
            return Vectors(self.width)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(place.d_model, config.width))
        self.time = nn.Parameter(torch.empty(place.d_model, 2 * FREQUENCIES))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        # each as large as the embedding of an id where the numbers of a vector are about 1; sines are about 1/√2
        parameter.normal_(0.0, (parameter.shape[0] * parameter.shape[1]) ** -0.5, generator=generator)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (n, width), time (n,) → (n, D)."""
        told = time_features(x.new_zeros(len(x)) if time is None else time)
        return F.linear(x.to(self.weight.dtype), self.weight) + F.linear(told.to(self.time.dtype), self.time)

    def cost(self) -> Cost:
        return Cost.matmul(self.weight.numel() + self.time.numel())


def time_features(time: Tensor) -> Tensor:
    """time (n,) from 0 to 1, at least fp32 → (n, 2 · FREQUENCIES): sines, then cosines, of 1000 t."""
    exponent = torch.arange(FREQUENCIES, device=time.device, dtype=time.dtype) / FREQUENCIES
    angle = 1000.0 * time.unsqueeze(-1) * SHORTEST**-exponent
    return torch.cat((angle.sin(), angle.cos()), -1)


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


def default_stem(carries: Carries, noisy: bool = False) -> StemConfig:
    """The stem of positions that carry something, unless the recipe says another.

    Args:
        noisy: what they carry may be mixed with noise, as it is in items that are denoised.
    """
    match carries:
        case Ids():
            return IdStem.Config()
        case Vectors(width):
            return NoisyVectorStem.Config(width=width) if noisy else VectorStem.Config(width=width)
        case Channels(count, size):
            return ChannelStem.Config(count=count, size=size)
