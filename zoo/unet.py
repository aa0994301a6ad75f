"""Down and up blocks of a U-Net as stem and head of images (Transfusion, arXiv 2408.11039 §4.1): convolutions between
what the positions carry and the residual stream, instead of a linear map.

An image of G × G positions is, at its finest, a picture of G p × G p places of c numbers, p² c of them a position.
From there each halving of the side doubles the channels, down to one place a position; up blocks go the other way.
The normalisation is a plain layer norm, and the time is added to the channels, where U-Nets modulate norms by it.
Blocks of the way down are not connected to those of the way up: the Transformer lies between.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.carries import Vectors
from zoo.config import ConfigError
from zoo.flops import Cost
from zoo.heads import HeadConfig, wide
from zoo.registry import BlockConfig, Place, register
from zoo.roles import ParameterOwner, Role
from zoo.slots import Head, TimedStem
from zoo.stems import FREQUENCIES, StemConfig, time_features


class Geometry(BlockConfig):
    """The keys that both ends share."""

    width: int = Field(gt=0)
    """Numbers of a vector: p² c."""
    grid: int = Field(gt=0)
    """G: an image has grid² positions, in raster order."""
    planes: int = Field(gt=0)
    """c: numbers of a place at the finest resolution, 3 for colours, or the channels of a latent."""
    channels: int = Field(128, gt=0)
    """Channels at the finest resolution; each halving of the side doubles them."""
    blocks: int = Field(2, gt=0)
    """Residual blocks of each resolution."""

    @property
    def carries(self) -> Vectors:
        return Vectors(self.width)

    @property
    def patch(self) -> int:
        """p: places on a side of a position."""
        return math.isqrt(self.width // self.planes)

    @property
    def levels(self) -> list[int]:
        """Channels of each resolution, the finest first; the last has one place a position."""
        return [self.channels * 2**level for level in range(self.patch.bit_length())]

    def places(self, channels: int) -> float:
        """How many places a position has at the resolution of so many channels."""
        return (self.patch * self.channels / channels) ** 2

    def check(self, place: Place, path: str) -> None:
        if self.patch**2 * self.planes != self.width or self.patch & (self.patch - 1):
            raise ConfigError(
                f"{path}.planes: {self.planes}; width {self.width} must be planes times the square of 1, 2, 4, 8, …"
            )

    def picture(self, vectors: Tensor) -> Tensor:
        """(n, width) of whole images → (n / G², c, G p, G p)."""
        side, patch = self.grid, self.patch
        if len(vectors) % side**2:
            raise ValueError(f"content: {len(vectors)} positions are no whole images of {side} × {side}")
        grid = vectors.reshape(len(vectors) // side**2, side, side, patch, patch, self.planes)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(grid), self.planes, side * patch, side * patch)

    def vectors(self, picture: Tensor) -> Tensor:
        """The inverse of `picture`."""
        side, patch = self.grid, self.patch
        grid = picture.reshape(len(picture), self.planes, side, patch, side, patch)
        return grid.permute(0, 2, 4, 3, 5, 1).reshape(len(picture) * side**2, self.width)


class Convolution(ParameterOwner):
    """A convolution of 3 × 3 places that keeps the size, or halves it.

    Args:
        places: outputs a position, for its cost.
        scale: standard deviation of the first weights in units of 1/√(inputs of an output).
    """

    roles = {"weight": Role.CONVOLUTION, "bias": Role.BIAS}

    def __init__(self, c_in: int, c_out: int, places: float, stride: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.places, self.stride, self.scale = places, stride, scale
        self.weight = nn.Parameter(torch.empty(c_out, c_in, 3, 3))
        self.bias = nn.Parameter(torch.empty(c_out))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        if name == "bias":
            parameter.zero_()
        else:
            parameter.normal_(0.0, self.scale * parameter[0].numel() ** -0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """(images, c_in, H, W) → (images, c_out, H / stride, W / stride)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=1)

    def cost(self) -> Cost:
        """For a position; borders are counted like the middle."""
        active = self.weight.numel() + self.bias.numel()
        return Cost.of(flops=2.0 * self.weight.numel() * self.places, active=active)


class ResidualBlock(ParameterOwner):
    """x + conv(SiLU(N(conv(SiLU(N(x)))))), N a layer norm over the channels of each place."""

    roles = {"first_gain": Role.GAIN, "second_gain": Role.GAIN}

    def __init__(self, channels: int, places: float) -> None:
        super().__init__()
        self.first_gain, self.second_gain = (nn.Parameter(torch.empty(channels)) for _ in range(2))
        self.first, self.second = (
            Convolution(channels, channels, places),
            Convolution(channels, channels, places, scale=0.5),
        )

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(images, channels, H, W) → the same shape."""
        y = self.first(F.silu(_layer_norm(x, self.first_gain)))
        return x + self.second(F.silu(_layer_norm(y, self.second_gain)))

    def cost(self) -> Cost:
        """For a position."""
        return self.first.cost() + self.second.cost() + Cost.of(active=2 * self.first_gain.numel())


def _layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    """Over the channels of each place of x (images, channels, H, W)."""
    return F.layer_norm(x.movedim(1, -1), (x.shape[1],), gain).movedim(-1, 1)


@register("stem", "unet_down")
class UNetDown(TimedStem):
    """From vectors to the residual stream through down blocks."""

    roles = {"time": Role.MATRIX}

    class Config(Geometry, StemConfig):
        pass

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config, levels = config, config.levels
        self.enter = Convolution(config.planes, levels[0], config.places(levels[0]))
        self.time = nn.Parameter(torch.empty(levels[0], 2 * FREQUENCIES))
        steps: list[ResidualBlock | Convolution] = []
        for channels in levels:
            steps += [ResidualBlock(channels, config.places(channels)) for _ in range(config.blocks)]
            if channels != levels[-1]:
                steps.append(Convolution(channels, 2 * channels, config.places(2 * channels), stride=2))
        self.steps = nn.ModuleList(steps)
        self.leave = Convolution(levels[-1], place.d_model, config.places(levels[-1]), scale=place.d_model**-0.5)

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x (n, width) of whole images, time (n,) → (n, D). The time of an image is that of its first position."""
        positions = self.config.grid**2
        told = x.new_zeros(len(x)) if time is None else time
        x = self.enter(self.config.picture(x.to(self.time.dtype)))
        features = time_features(told[::positions]).to(x.dtype)
        x = x + F.linear(features, self.time)[:, :, None, None]
        for step in self.steps:
            x = step(x)
        return self.leave(x).movedim(1, -1).flatten(0, 2)

    def cost(self) -> Cost:
        told = Cost.of(flops=2.0 * self.time.numel() / self.config.grid**2, active=self.time.numel())
        return told + _cost(self)


@register("head", "unet_up")
class UNetUp(Head):
    """From the last layer to vectors through up blocks: `UNetDown` the other way round."""

    class Config(Geometry, HeadConfig):
        def loss(self, prediction: Tensor, target: Tensor) -> Tensor:
            """Squared error, a mean over the numbers of a vector; both (n, width)."""
            return (wide(prediction) - target).square().mean(-1)

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.config, levels = config, config.levels[::-1]
        self.enter = Convolution(place.d_model, levels[0], config.places(levels[0]))
        steps: list[nn.Module] = []
        for channels in levels:
            steps += [ResidualBlock(channels, config.places(channels)) for _ in range(config.blocks)]
            if channels != levels[-1]:
                steps += [
                    nn.Upsample(scale_factor=2),
                    Convolution(channels, channels // 2, config.places(channels // 2)),
                ]
        self.steps = nn.ModuleList(steps)
        self.leave = Convolution(levels[-1], config.planes, config.places(levels[-1]))

    def forward(self, x: Tensor) -> Tensor:
        """x (n, D) of whole images → (n, width)."""
        side = self.config.grid
        if len(x) % side**2:
            raise ValueError(f"{len(x)} positions are no whole images of {side} × {side}")
        x = self.enter(x.reshape(len(x) // side**2, side, side, x.shape[-1]).movedim(-1, 1))
        for step in self.steps:
            x = step(x)
        return self.config.vectors(self.leave(F.silu(x)))

    def cost(self) -> Cost:
        return _cost(self)


def _cost(end: UNetDown | UNetUp) -> Cost:
    """What convolutions and norms cost a position."""
    own = [step for step in end.steps if isinstance(step, ResidualBlock | Convolution)]
    return Cost.total(part.cost() for part in (end.enter, *own, end.leave))
