"""How a token is chosen from logits: temperature, top-k, top-p, a penalty for repetition, and noise that is a function
of (seed, sample, position), so that a draw does not depend on what else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from zoo import noise
from zoo.config import Config
from zoo.heads import wide


class Choosing(Config):
    """How tokens are chosen, and what is drawn by."""

    temperature: float = Field(1.0, ge=0)
    """Logits are divided by it; 0 takes the likeliest."""
    top_k: int | None = Field(None, ge=1)
    """Only so many of the likeliest; null: any."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Only the likeliest that together reach this probability (nucleus sampling, arXiv 1904.09751)."""
    repetition_penalty: float = Field(1.0, gt=0)
    """What the logits of ids of text that stand in the document already are divided by where positive, multiplied by
    where negative (CTRL, arXiv 1909.05858 §4.1); 1: none."""
    guidance: float = Field(1.0, ge=0)
    """w of classifier-free guidance (arXiv 2207.12598) inside items: u + w (c − u), c being what the model says, and u
    what it says of the item without the rest of its document; 1: none."""
    seed: int = Field(0, ge=0)
    """Everything drawn is a function of (seed, number of the sample, position)."""


def noise_keys(seed: int, samples: Sequence[int], positions: Sequence[int]) -> Tensor:
    """(n,) int32 key of each (sample, position) for `zoo.noise`."""
    columns = max(positions, default=0) + 1
    keys = noise.token_keys(seed, np.asarray(samples), columns)
    return torch.from_numpy(keys[np.arange(len(samples)), np.asarray(positions, np.int64)])


def choose(logits: Tensor, choosing: Choosing, keys: Tensor, salt: str) -> Tensor:
    """One of n for each row: the largest of logits and Gumbel noise, which is a draw from their softmax.

    Args:
        logits: (B, n) or (B, c, n), −inf where something may not be chosen.
        keys: (B,) int32, from `noise_keys`.
        salt: what is chosen, so that other choices at the same position draw other noise.
    Returns:
        (B,) or (B, c) int64.
    """
    logits = wide(logits)
    if choosing.temperature == 0:
        return logits.argmax(-1)
    logits = _likeliest(logits / choosing.temperature, choosing)
    width = math.prod(logits.shape[1:])
    uniform = noise.uniform(keys.to(logits.device), noise.salt(salt, 0), width).view(logits.shape)
    return (logits - (-uniform.log()).log()).argmax(-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (V,) with those of the ids `seen` (n,) moved towards the unlikely."""
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _likeliest(logits: Tensor, choosing: Choosing) -> Tensor:
    """Logits with −inf where top-k or top-p leave something out."""
    if choosing.top_k is not None and choosing.top_k < logits.shape[-1]:
        least = logits.topk(choosing.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if choosing.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        share = ranked.softmax(-1)
        out = share.cumsum(-1) - share >= choosing.top_p  # what stands before it reaches top_p by itself
        logits = logits.masked_fill(torch.zeros_like(out).scatter(-1, order, out), -math.inf)
    return logits
