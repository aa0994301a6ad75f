"""Capacity schedules of Mixture-of-Depths: over the layers of a model, and over the steps of training.

Pure functions with exact results: a capacity is a `Fraction`, so that k = ⌈count · capacity⌉ is the same everywhere. A
constant capacity is the absence of a schedule. A step schedule reads the step of the context; nothing counts calls.
Source of the cosine: p-MoD's progressive ratio decay (arXiv 2412.04449).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

from pydantic import Field

from zoo.config import Config
from zoo.routing.capacity import Capacity, Number, number

DENOMINATOR = 10**6
"""The cosine, an irrational number, is rounded to a multiple of 1 / DENOMINATOR; all else is exact."""


def linear(layer: int, layers: int) -> Fraction:
    """How much of `first` is left at `layer`: 1 − layer / (layers − 1), from 1 in the first layer to 0 in the last.

    0 in a model of one layer.
    """
    return 1 - Fraction(layer, layers - 1) if layers > 1 else Fraction(0)


def cosine(layer: int, layers: int) -> Fraction:
    """(1 + cos(π · layer / (layers − 1))) / 2, rounded to a multiple of 1 / DENOMINATOR: from 1 to 0 as `linear`."""
    gone = float(1 - linear(layer, layers))
    return Fraction(round((1 + math.cos(math.pi * gone)) / 2 * DENOMINATOR), DENOMINATOR)


def warm_down(step: int, steps: int, start: Fraction, end: Fraction) -> Fraction:
    """From `start` at step 0 in a straight line down to `end` at step `steps` and after; never below `end`."""
    return max(end, end + (start - end) * (1 - Fraction(min(step, steps), steps)))


class OverLayers(Config):
    """Capacity that changes with the layer.

    The curve goes from `first` in the model's first layer to `last` in its last, counting layers without routers too. A
    capacity never falls below the block's own, `capacity`. p-MoD's schedule, ½ cos(π i / (L − 1)) + R, dense above
    0.85, at least 0.15, is `{type: cosine, first: R + ½, last: R − ½, dense_above: 0.85}` with
    `capacity: {text: 1.0, image: 0.15}`.
    """

    type: Literal["linear", "cosine"]
    first: Number = 1.0
    """Capacity at the model's first layer."""
    last: Number | None = None
    """Capacity at the model's last layer; default: the block's capacity."""
    dense_above: Capacity = 1.0
    """Where the curve is above this, and where it reaches 1, the layer has no router: every token passes."""

    def capacity(self, layer: int, layers: int, least: Fraction) -> Fraction:
        """Capacity of the layer numbered `layer`, from 0, of `layers`; 1 where it is dense.

        Args:
            least: the block's `capacity`.
        """
        first, last = number(self.first), least if self.last is None else number(self.last)
        share = {"linear": linear, "cosine": cosine}[self.type](layer, layers)
        value = last + (first - last) * share
        return Fraction(1) if value > number(self.dense_above) or value >= 1 else max(least, value)


class WarmDown(Config):
    """Capacity that starts high and falls in a straight line, while the router learns, to the layer's final one.

    In training alone: an evaluation uses the final capacity, whatever the step.
    """

    type: Literal["warm_down"]
    steps: int = Field(gt=0)
    """Optimizer steps until the final capacity is reached."""
    start: Capacity = 1.0
    """Capacity at step 0. A layer whose final capacity is higher keeps that."""

    def capacity(self, step: int, final: Fraction) -> Fraction:
        """Capacity at `step` of a layer that ends at `final`."""
        return warm_down(step, self.steps, number(self.start), final)
