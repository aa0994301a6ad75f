"""Dense SwiGLU feed-forward."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.layers import Linear
from zoo.registry import BlockConfig, Place, register


@register("feedforward", "dense")
class Dense(nn.Module):
    """y = (SiLU(x W_gate) ⊙ x W_up) W_out (arXiv 2002.05202)."""

    class Config(BlockConfig):
        d_ff: int = Field(gt=0)
        """Hidden width F."""

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.modalities = len(place.modalities)
        self.w_in = Linear(place.d_model, 2 * config.d_ff)
        self.w_out = Linear(config.d_ff, place.d_model, scale=(2 * place.layers) ** -0.5)

    def forward(self, x: Tensor, context: TokenContext, state: None = None) -> Tensor:
        """(B, T, D) → (B, T, D); 0 stays 0, so padding does."""
        gate, up = self.w_in(x).chunk(2, dim=-1)
        return self.w_out(F.silu(gate) * up)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        return Cost.matmul(self.modalities, self.w_in.weight.numel() + self.w_out.weight.numel())
