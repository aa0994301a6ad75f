"""Dense SwiGLU feed-forward, tied or one a modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.context import TokenContext
from zoo.flops import Cost
from zoo.registry import BlockConfig, Place, register
from zoo.slots import FeedForward
from zoo.untied import Grouping, ModalityLinear, Towers, check_towers


@register("feedforward", "dense")
class Dense(FeedForward, counter_noise=True):
    """y = (SiLU(x W_gate) ⊙ x W_up) W_out (arXiv 2002.05202), or one such network a modality."""

    class Config(BlockConfig):
        d_ff: int = Field(gt=0)
        """Hidden width F."""
        untied: bool = False
        """Weights of their own for each modality (Mixture-of-Transformers, arXiv 2411.04996 §3)."""
        towers: Towers | None = None
        """Modalities that share their untied weights; default: none do."""

        def check(self, place: Place, path: str) -> None:
            check_towers(self.towers, place.modalities, f"{path}.towers", None if self.untied else f"{path}.untied")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.grouping = Grouping.of(place.modalities, config.towers, untied=config.untied)
        groups = self.grouping.count
        self.w_in = ModalityLinear(place.d_model, 2 * config.d_ff, groups)
        self.w_out = ModalityLinear(config.d_ff, place.d_model, groups, scale=(2 * place.layers) ** -0.5)

    def forward(self, x: Tensor, context: TokenContext, state: None = None) -> Tensor:
        """(B, T, D) → (B, T, D); 0 stays 0, so padding does."""
        sizes = self.grouping.sizes(context)
        gate, up = self.w_in(self.grouping.split(x, context), sizes).chunk(2, dim=-1)
        return self.grouping.unsort(self.w_out(F.silu(gate) * up, sizes), context)

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        return self.w_in.cost() + self.w_out.cost()
