"""Capacity: how much of a pool is taken, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

import pydantic


def number(value: Any) -> Fraction:
    """A number, or a fraction written as "1/4", exactly as it is written.

    Raises:
        ValueError: it is neither.
    """
    try:
        return Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError("must be a number or a fraction such as '1/4'") from None


def _number(value: float | str) -> float | str:
    number(value)
    return value


def _capacity(value: float | str) -> float | str:
    if not 0 < number(value) <= 1:
        raise ValueError("must be above 0 and at most 1")
    return value


Number = Annotated[float | str, pydantic.BeforeValidator(_number)]
"""0.25 or "1/4", of any size and sign."""

Capacity = Annotated[float | str, pydantic.BeforeValidator(_capacity)]
"""Share of a pool's tokens that is taken: 0.25 or "1/4"."""


def capacity_count(tokens: int, capacity: Fraction) -> int:
    """k = ⌈tokens · capacity⌉."""
    return -(-tokens * capacity.numerator // capacity.denominator)
