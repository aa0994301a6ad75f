"""What a position of the stream carries: an id of the vocabulary, a vector, or channels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


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


def nothing(carries: Carries, device: torch.device | str = "cpu") -> Tensor:
    """What no positions carry: (0, …) of the type and shape of what positions do."""
    match carries:
        case Ids():
            return torch.zeros(0, dtype=torch.int64, device=device)
        case Vectors(width):
            return torch.zeros(0, width, device=device)
        case Channels(count, _):
            return torch.zeros(0, count, dtype=torch.int64, device=device)
