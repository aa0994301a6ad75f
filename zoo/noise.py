"""Counter-based noise: a pure function of (seed, row, column, step, layer), never of a generator's state.

Every token carries a 32-bit `key`, hashed on the host from the seed and the token's place in the global sequence of
rows. A block mixes it with a salt of its name and the step. So noise does not depend on the number of ranks, on the
split into micro-batches, on which tokens a router kept, or on activation checkpointing, and resuming needs no state.

The mixer is the two-round xor-shift-multiply hash of 32-bit integers.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor

_FIRST, _SECOND, _GOLDEN = 0x7FEB352D, 0x846CA68B, 0x9E3779B9


def hash32(value: np.ndarray) -> np.ndarray:
    """Mix unsigned 32-bit integers; same shape, uint32. A bijection, equal to the tensor version in `uniform`."""
    value = value.astype(np.uint32, copy=True)
    with np.errstate(over="ignore"):
        value ^= value >> np.uint32(16)
        value *= np.uint32(_FIRST)
        value ^= value >> np.uint32(15)
        value *= np.uint32(_SECOND)
        value ^= value >> np.uint32(16)
    return value


def unhash32(value: np.ndarray) -> np.ndarray:
    """The inverse of `hash32`; same shape, uint32."""
    value = value.astype(np.uint32, copy=True)
    with np.errstate(over="ignore"):
        value ^= value >> np.uint32(16)
        value *= np.uint32(pow(_SECOND, -1, 1 << 32))
        value ^= (value >> np.uint32(15)) ^ (value >> np.uint32(30))
        value *= np.uint32(pow(_FIRST, -1, 1 << 32))
        value ^= value >> np.uint32(16)
    return value


def token_keys(seed: int, rows: np.ndarray, columns: int) -> np.ndarray:
    """Keys of the tokens of global rows `rows` (B,), each `columns` long: (B, T) int32."""
    state = hash32(np.full(1, seed & 0xFFFFFFFF, np.uint64))
    state = hash32(state ^ (rows.astype(np.uint64) & 0xFFFFFFFF).astype(np.uint32))
    state = hash32(state ^ (rows.astype(np.uint64) >> np.uint64(32)).astype(np.uint32))
    return hash32(state[:, None] ^ hash32(np.arange(columns, dtype=np.uint32))[None, :]).view(np.int32)


def salt(name: str, step: int | Tensor) -> int | Tensor:
    """A signed 32-bit number for the noise of the block `name` at `step`; a tensor of it where `step` is one."""
    if isinstance(step, Tensor):
        return _mix(((step * _GOLDEN) ^ checksum(name)).to(torch.int32))
    mixed = hash32(np.array([checksum(name) ^ ((step * _GOLDEN) & 0xFFFFFFFF)], np.uint64))
    return int(mixed.view(np.int32)[0])


def checksum(name: str) -> int:
    """CRC-32 of a name; a graph must take it as a constant (`pretrain.compiling`)."""
    return zlib.crc32(name.encode())


def uniform(key: Tensor, salt: int | Tensor, width: int) -> Tensor:
    """Uniform numbers in (0, 1), fp32.

    Args:
        key: (..., ) int32, one a token.
        salt: from `salt`.
        width: how many numbers a token gets.
    Returns:
        (..., width) fp32; never exactly 0 or 1.
    """
    column = torch.arange(width, device=key.device, dtype=torch.int32) * _signed(_GOLDEN)
    value = _mix((key ^ salt).unsqueeze(-1) + column)
    # the largest of them, and half, would round to 1
    return ((value >> 8) & 0xFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-24).clamp_max_(1 - 2.0**-24)


def normal(key: Tensor, salt: int | Tensor, width: int) -> Tensor:
    """Draws of the normal distribution with mean 0 and variance 1 (Box and Muller, 1958): (..., width) fp32.

    Args:
        key, salt, width: as for `uniform`.
    """
    pairs = -(-width // 2)
    first, second = uniform(key, salt, 2 * pairs).split(pairs, -1)
    radius, angle = (-2.0 * first.log()).sqrt(), (2.0 * math.pi) * second
    return torch.cat((radius * angle.cos(), radius * angle.sin()), -1)[..., :width]


def logistic(key: Tensor, salt: int | Tensor, width: int) -> Tensor:
    """Draws of the logistic distribution, the difference of two independent Gumbel draws: (..., width) fp32."""
    value = uniform(key, salt, width)
    return value.log() - (-value).log1p()


def dropout(x: Tensor, probability: float, key: Tensor, salt: int | Tensor) -> Tensor:
    """Inverted dropout of x (..., D): zero with `probability`, the rest scaled; a function of (key, salt)."""
    if probability == 0.0:
        return x
    keep = uniform(key, salt, x.shape[-1]) >= probability
    return x * (keep * (1.0 / (1.0 - probability))).to(x.dtype)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def _mix(value: Tensor) -> Tensor:
    # int32 products wrap; an arithmetic shift followed by a mask is the logical one
    value = value ^ ((value >> 16) & 0xFFFF)
    value = value * _signed(_FIRST)
    value = value ^ ((value >> 15) & 0x1FFFF)
    value = value * _signed(_SECOND)
    return value ^ ((value >> 16) & 0xFFFF)
