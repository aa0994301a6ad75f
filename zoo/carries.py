"""What a position of the stream carries: an id of the vocabulary, a vector, or channels."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Ids:
    """A position carries one id in [0, size), which gets a range of the vocabulary."""

    size: int


@dataclasses.dataclass(frozen=True)
class Vectors:
    """A position carries a vector of `width` numbers, float32."""

    width: int


@dataclasses.dataclass(frozen=True)
class Channels:
    """A position carries `count` ids, each in [0, size)."""

    count: int
    size: int


Carries = Ids | Vectors | Channels
