"""Processes: how data become noise as time goes from 0 (data) to 1 (noise), and what of it a model predicts.

    x_t = a(t) · data + b(t) · noise,   noise normal with variance 1

This is the convention of the whole code. Others count time from noise to data (Show-o2), or in steps up to T.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Scales(NamedTuple):
    """How large data and noise are at a time."""

    data: Tensor
    """The factor a(t) of the data."""
    noise: Tensor
    """The factor b(t) of the noise."""


class Split(NamedTuple):
    """What a model believes a mixture to be made of."""

    data: Tensor
    noise: Tensor


class Process(abc.ABC):
    """One way from data to noise. Tensors of times are at least fp32 and of any shape; so is what is made of them."""

    @abc.abstractmethod
    def time(self, share: Tensor, limit: Tensor) -> Tensor:
        """Times for training: the quantile of their distribution at `share`, uniform in (0, 1).

        Args:
            limit: in (0, 1], 1 for the whole distribution; smaller, it is squeezed to the times up to `limit`.
        """

    @abc.abstractmethod
    def scales(self, time: Tensor) -> Scales:
        """How large data and noise are at each time."""

    @abc.abstractmethod
    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        """What the model is to predict."""

    @abc.abstractmethod
    def split(self, mixture: Tensor, prediction: Tensor, time: Tensor) -> Split:
        """Data and noise by a prediction of `target`, at times below 1 that broadcast with the mixture."""

    @abc.abstractmethod
    def constant_loss(self, variance: float) -> float:
        """Mean squared error of the best constant guess at `target`, for data of that variance."""

    def mix(self, data: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t; the times broadcast with the data."""
        scales = self.scales(time)
        return scales.data * data + scales.noise * noise


@dataclasses.dataclass(frozen=True)
class Diffusion(Process):
    """DDPM (arXiv 2006.11239) with the cosine schedule as Transfusion has it (arXiv 2408.11039 §2.2):
    x_t = cos(πt/2) data + sin(πt/2) noise, t uniform. The noise is predicted."""

    steps: int | None = 1000
    """T: times are 1/T, 2/T, …, 1; None: any time."""

    def time(self, share: Tensor, limit: Tensor) -> Tensor:
        time = share * limit
        return time if self.steps is None else (time * self.steps).ceil() / self.steps

    def scales(self, time: Tensor) -> Scales:
        angle = time * (math.pi / 2)
        return Scales(angle.cos(), angle.sin())

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise

    def split(self, mixture: Tensor, prediction: Tensor, time: Tensor) -> Split:
        scales = self.scales(time)
        return Split((mixture - scales.noise * prediction) / scales.data, prediction)

    def constant_loss(self, variance: float) -> float:
        return 1.0


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
    """Rectified flow (arXiv 2209.03003): x_t = (1 − t) data + t noise. The velocity, noise − data, is predicted."""

    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """"logit_normal": t = σ(z), z normal (arXiv 2403.03206 §3.1)."""
    shift: float = 1.0
    """s: t becomes s t / (1 + (s − 1) t); above 1 it makes noise more frequent (arXiv 2403.03206 §5.3.2)."""

    def time(self, share: Tensor, limit: Tensor) -> Tensor:
        time = torch.special.ndtri(share).sigmoid() if self.times == "logit_normal" else share
        return limit * self.shift * time / (1 + (self.shift - 1) * time)

    def scales(self, time: Tensor) -> Scales:
        return Scales(1 - time, time)

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return noise - data

    def split(self, mixture: Tensor, prediction: Tensor, time: Tensor) -> Split:
        return Split(mixture - time * prediction, mixture + (1 - time) * prediction)

    def constant_loss(self, variance: float) -> float:
        return 1.0 + variance
