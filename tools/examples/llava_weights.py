"""First weights of a small LLaVA, with which it learns in minutes what pretrained ones know already: where a patch is,
and that near patches belong together."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from zoo.config import Config


class TowerConfig(Config):
    """CLIP's vision tower."""

    d_model: int = Field(gt=0, multiple_of=4)
    """Features of a patch."""
    layers: int = Field(gt=0)
    """Number of layers."""
    heads: int = Field(gt=0)
    """Heads of each layer's attention."""
    d_ff: int = Field(gt=0)
    """Hidden width of the feed-forward."""
    local: float = Field(2.0, ge=0)
    """How much its heads prefer near patches at the start; 0: not at all."""


class DecoderConfig(Config):
    """Sizes of Llama's decoder."""

    d_model: int = Field(gt=0)
    """Width of the residual stream."""
    layers: int = Field(gt=0)
    """Number of layers."""
    heads: int = Field(gt=0)
    """Heads of each layer's attention."""
    d_ff: int = Field(gt=0)
    """Hidden width of the feed-forward."""
    positions: int = Field(1024, gt=0)
    """Tokens of the longest sequence."""
    rope_theta: float = Field(1e6, gt=1)
    """Base of the wavelengths of rotary position embedding."""
    initial: float = Field(0.05, gt=0)
    """Deviation of all its first weights."""


@torch.no_grad()
def initialise(model: Any, vision: TowerConfig, decoder: DecoderConfig, side: int) -> None:
    """Set the weights of a LlavaForConditionalGeneration with a CLIP tower of `side` × `side` patches and a Llama
    decoder. Draws from torch's generator.

    * Decoder, projector and head: N(0, decoder.initial²).
    * The tower's position embedding: sines and cosines of row and column (as arXiv 2111.06377); its queries and keys
    read
      them alike, so that near patches see each other (the mimetic initialisation of arXiv 2305.09828).
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    for weight in (*language.parameters(), *projector.parameters(), *model.lm_head.parameters()):
        if weight.dim() == 2:
            weight.normal_(std=decoder.initial)
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    tower.embeddings.position_embedding.weight[0] = 0  # the class token's
    tower.embeddings.position_embedding.weight[1:] = sines(side, vision.d_model)
    if vision.local:
        for layer in tower.encoder.layers:
            _near_patches(layer.self_attn, vision)


def sines(side: int, width: int, fastest: float = 2.0, span: float = 20.0) -> Tensor:
    """Position code (side·side, width) of patches in raster order: sin and cos of the row at width/4 frequencies, then
    of the column.

    Args:
        fastest: highest frequency, radians a patch.
        span: the highest frequency over the lowest.
    """
    quarter = width // 4
    angle = torch.arange(side)[:, None] * fastest / span ** (torch.arange(quarter) / quarter)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def _near_patches(attention: Any, config: TowerConfig) -> None:
    """Queries and keys of each head read the same share of the position code, besides a little at random."""
    quarter, size = config.d_model // 4, config.d_model // config.heads
    code = torch.zeros(config.d_model, config.d_model)
    taken = [0] * config.heads
    for pair in range(quarter):
        head = pair % config.heads
        for feature in (pair, pair + quarter, pair + 2 * quarter, pair + 3 * quarter):  # sin, cos of row, of column
            if taken[head] < size:
                code[head * size + taken[head], feature] = config.local
                taken[head] += 1
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.3).add_(code)
