"""First weights of a small LLaVA, with which it learns in minutes what pretrained ones know already: where a patch is, that
near patches belong together, and what the word before says."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.config import Config

LOCAL_PEAK, LOCAL_MARK = 10.0, 4.0
"""Of heads that begin local: their logit at the token they look at, and the coordinate that all tokens share."""


class TowerConfig(Config):
    """CLIP's vision tower."""

    d_model: int = Field(gt=0, multiple_of=4)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    local: float = Field(2.0, ge=0)
    """How much its heads prefer near patches at the start; 0: not at all."""


class DecoderConfig(Config):
    """Llama's decoder."""

    d_model: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    d_ff: int = Field(gt=0)
    positions: int = Field(1024, gt=0)
    """Tokens of the longest sequence."""
    rope_theta: float = Field(1e6, gt=1)
    local_heads: int = Field(2, ge=0)
    """Heads of the first layer that begin by looking 1, 2, … tokens back."""


@torch.no_grad()
def initialise(model: Any, vision: TowerConfig, decoder: DecoderConfig, side: int) -> None:
    """Set the weights of a LlavaForConditionalGeneration with a CLIP tower of `side` × `side` patches and a Llama decoder.
    Draws from torch's generator.

    * Decoder and projector: N(0, 1/fan-in), what is added to the residual stream by 1/√(2·layers) less, embeddings
      N(0, 1), the head N(0, 0.02²).
    * The tower's position embedding: sines and cosines of row and column (as arXiv 2111.06377); its queries and keys read
      them alike, so that near patches see each other (the mimetic initialisation of arXiv 2305.09828).
    * `decoder.local_heads` of the first layer look 1, 2, … tokens back by rotary position alone, for which all tokens
      share one coordinate: among hundreds of image tokens a random head would hardly see the word before.
    """
    language, projector = model.model.language_model, model.model.multi_modal_projector
    for name, weight in [*language.named_parameters(), *projector.named_parameters()]:
        if name.startswith("embed_tokens"):
            weight.normal_(std=1.0)
        elif weight.dim() == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            depth = 2 * decoder.layers if residual else 1
            weight.normal_(std=(weight.shape[1] * depth) ** -0.5)
    model.lm_head.weight.normal_(std=0.02)
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    tower.embeddings.position_embedding.weight[0] = 0  # the class token's
    tower.embeddings.position_embedding.weight[1:] = sines(side, vision.d_model)
    if vision.local:
        for layer in tower.encoder.layers:
            _near_patches(layer.self_attn, vision)
    if decoder.local_heads:
        language.embed_tokens.weight[:, 0] = LOCAL_MARK
        projector.linear_2.weight[0] = 0
        projector.linear_2.bias[0] = LOCAL_MARK
        _near_tokens(language.layers[0].self_attn, decoder)


def sines(side: int, width: int, fastest: float = 2.0, span: float = 20.0) -> Tensor:
    """Position code (side·side, width) of patches in raster order: sin and cos of the row at width/4 frequencies, then of
    the column.

    Args:
        fastest: highest frequency, radians a patch.
        span: the highest frequency over the lowest.
    """
    quarter = width // 4
    angle = torch.arange(side)[:, None] * fastest / span ** (torch.arange(quarter) / quarter)
    line = torch.cat([angle.sin(), angle.cos()], 1)  # (side, width / 2)
    rows, columns = line[:, None].expand(side, side, -1), line[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def _near_patches(attention: nn.Module, config: TowerConfig) -> None:
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


def _near_tokens(attention: nn.Module, config: DecoderConfig) -> None:
    """Head j looks j + 1 tokens back and copies a share of the features found there."""
    size = config.d_model // config.heads
    half = size // 2
    frequency = config.rope_theta ** (-torch.arange(half) / half)
    fast = int((frequency > 0.1).sum())  # slower ones tell near from far too late
    frequency = frequency[:fast]
    mark = LOCAL_MARK / math.sqrt((config.d_model - 1 + LOCAL_MARK**2) / config.d_model)  # after the norm
    scale = math.sqrt(LOCAL_PEAK * math.sqrt(size) / fast) / mark
    turn = torch.linalg.qr(torch.randn(config.d_model, config.d_model))[0]
    for head in range(config.local_heads):
        rows = slice(head * size, (head + 1) * size)
        query, key = torch.zeros(size, config.d_model), torch.zeros(size, config.d_model)
        key[:fast, 0] = scale
        query[:fast, 0] = scale * torch.cos(frequency * (head + 1))
        query[half : half + fast, 0] = -scale * torch.sin(frequency * (head + 1))
        attention.q_proj.weight[rows], attention.k_proj.weight[rows] = query, key
        attention.v_proj.weight[rows], attention.o_proj.weight[:, rows] = turn[rows], turn[rows].T
