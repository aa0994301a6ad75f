"""The linear scorer: one linear map and an activation, in fp32.

Sources: MoMa (arXiv 2407.21770 §2.2–2.3), Mixture-of-Depths (arXiv 2404.02258 §3).
"""

from __future__ import annotations

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from zoo import noise
from zoo.config import ConfigError
from zoo.layers import wide_linear
from zoo.registry import BlockConfig, Place, register
from zoo.roles import Role
from zoo.routing.candidates import Candidates
from zoo.routing.scorer import Scorer


@register("router", "linear")
class LinearScorer(Scorer, counter_noise=True):
    """scores = activation(x W), in fp32 whatever the model's precision; weights start small. Choice is expert choice.

    Sigmoid per expert: a token's weight does not depend on other tokens or experts (MoMa eq. 2).
    """

    roles = {"weight": Role.ROUTER}

    class Config(BlockConfig):
        activation: Literal["sigmoid", "raw", "softmax", "tanh"] = "sigmoid"
        """"raw" multiplies by the logit itself (Mixture-of-Depths eq. 1); "sigmoid" bounds it (MoMa); "softmax" makes
        the experts compete for a token (expert choice as first published, arXiv 2202.09368 §3.2); "tanh" is
        1 + tanh_scale · tanh(logit), the identity at a logit of 0 (p-MoD's TanhNorm, arXiv 2412.04449)."""
        tanh_scale: float | None = pydantic.Field(None, gt=0)
        """How far a tanh weight may be from 1; default 0.2, p-MoD's."""
        noise: Literal["none", "gumbel"] = "none"
        """"gumbel" adds the difference of two Gumbel draws to the logit in training, before selection and weight
        (Gumbel-sigmoid, MoMa eq. 5): it lets copies of one expert, after upcycling, part ways. Under softmax one draw
        an expert."""
        initial_scale: float = pydantic.Field(0.1, ge=0)
        """Standard deviation of the first weights in units of 1/√d_model."""

        @pydantic.model_validator(mode="after")
        def _scale_of_tanh_alone(self) -> LinearScorer.Config:
            if self.tanh_scale is not None and self.activation != "tanh":
                raise ValueError(
                    f"tanh_scale has no meaning under activation {self.activation!r}; leave it out or choose tanh"
                )
            return self

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        super().__init__()
        self.tanh_scale = 0.2 if config.tanh_scale is None else config.tanh_scale
        self.activation, self.noise = config.activation, config.noise
        self.deviation = config.initial_scale * place.d_model**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, place.d_model))

    def initialise(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        parameter.normal_(0.0, self.deviation, generator=generator)

    @classmethod
    def check_experts(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        if noop and isinstance(config, LinearScorer.Config) and config.activation != "softmax":
            raise ConfigError(
                f"{path}.activation: {config.activation}; a no-op expert works by drawing scores away from the others, "
                "which only softmax does under expert choice: set activation: softmax, or type: token_choice"
            )

    @classmethod
    def check_depth(cls, config: BlockConfig, path: str) -> None:
        if isinstance(config, LinearScorer.Config) and config.activation == "softmax":
            raise ConfigError(
                f"{path}.activation: softmax over a single output is always 1 and learns nothing; use sigmoid, raw or "
                "tanh"
            )

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        logits = wide_linear(x, self.weight)
        if self.noise == "gumbel" and self.training and candidates is not None:
            draw = gumbel if self.activation == "softmax" else noise.logistic
            logits = logits + draw(candidates.key, candidates.salt, logits.shape[-1]).to(logits.dtype)
        return self.activate(logits)

    def activate(self, logits: Tensor) -> Tensor:
        """Logits (n, outputs) → scores."""
        if self.activation == "softmax":
            return logits.softmax(-1)
        if self.activation == "tanh":
            return 1 + self.tanh_scale * logits.tanh()
        return logits.sigmoid() if self.activation == "sigmoid" else logits


def gumbel(key: Tensor, salt: int | Tensor, width: int) -> Tensor:
    """Gumbel draws, a function of (key, salt): (..., width) fp32."""
    return -(-noise.uniform(key, salt, width).log()).log()
