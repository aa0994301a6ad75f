"""A user's own block, as a recipe imports it: a feed-forward whose output is not a number at the steps a test says."""

from __future__ import annotations

import math

import torch
from torch import nn

import zoo

BAD: set[int] = set()
"""Steps (from 0) whose training output is NaN."""


@zoo.register("feedforward", "poisoned")
class Poisoned(zoo.FeedForward):
    class Config(zoo.BlockConfig):
        pass

    def __init__(self, config: Config, place: zoo.Place) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(place.d_model, place.d_model))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, 0.02, generator=generator)

    def forward(self, x: torch.Tensor, context: zoo.TokenContext, state: object = None) -> torch.Tensor:
        """(B, T, D) → (B, T, D)."""
        y = x @ self.weight
        return y * math.nan if self.training and context.step in BAD else y

    def cost(self, length: float, load: object = None) -> zoo.Cost:
        return zoo.Cost.matmul(self.weight.numel())
