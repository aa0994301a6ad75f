"""Token choice: a router by which each token takes its k best experts, balanced by a loss or by biases.

Nothing is dropped and no token looks at another, so the choice is the same in training and in causal use. How full an
expert gets is left to balancing:

- a loss, E · Σ fᵢ Pᵢ with fᵢ the share of the choices that fell on expert i and Pᵢ its mean probability; 1 at uniform
  load (Switch Transformer, arXiv 2101.03961 §2.2);
- or, without a loss, a bias on each expert's score that counts for choosing and not for weighing, moved by one tick a
  step towards equal load (arXiv 2408.15664 §3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from zoo.config import Config, ConfigError
from zoo.registry import BlockConfig, Place, register
from zoo.routing.candidates import Candidates
from zoo.routing.chooser import TokenChoice
from zoo.routing.linear import LinearScorer
from zoo.routing.scorer import Router
from zoo.routing.selection import ExpertSelection


class Balance(Config):
    """What keeps experts evenly used. Loads count no-op experts like the others."""

    type: Literal["none", "loss", "bias"] = "loss"
    weight: float | None = Field(None, ge=0)
    """Weight of the balancing loss in the training loss; default 0.01. The loss is taken over a micro-batch, so the
    split into micro-batches matters."""
    rate: float | None = Field(None, gt=0)
    """How far a bias moves in a step; default 0.001. Loads are those of the whole step, all ranks."""

    @model_validator(mode="after")
    def _only_its_own(self) -> Balance:
        for key, owner in (("weight", "loss"), ("rate", "bias")):
            if getattr(self, key) is not None and self.type != owner:
                raise ValueError(f"{key} belongs to type: {owner}, not {self.type}; remove it or choose that type")
        return self


@register("router", "token_choice")
class TokenChoiceRouter(LinearScorer, Router, counter_noise=True):
    """Scores a token by a linear map, takes its top-k experts and weighs each by its score."""

    class Config(BlockConfig):  # pyrefly: ignore[bad-override]  # other keys than a linear scorer's
        top_k: int = Field(2, gt=0)
        """Experts of each token, no-op experts included."""
        score: Literal["softmax", "sigmoid"] = "softmax"
        """Over all experts (Switch, Mixtral), or of each alone (arXiv 2408.15664)."""
        normalise: bool | None = None
        """Divide a token's weights by their sum over its chosen experts. Default: where top_k is above 1."""
        balance: Balance = Balance()
        noise: Literal["none", "gumbel"] = "none"
        """As in the linear router."""
        initial_scale: float = Field(0.1, ge=0)
        """Standard deviation of the first weights in units of 1/√d_model."""

        @model_validator(mode="after")
        def _learns(self) -> TokenChoiceRouter.Config:
            if self.top_k == 1 and self.normalise:
                raise ValueError(
                    "normalise: true with top_k: 1 makes every weight 1, so the router has no gradient; set it to false"
                )
            return self

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        linear = LinearScorer.Config(activation=config.score, noise=config.noise, initial_scale=config.initial_scale)
        super().__init__(linear, place, outputs)
        self.name, self.outputs = place.name, outputs
        normalise = config.top_k > 1 if config.normalise is None else config.normalise
        self.chooser = TokenChoice(config.top_k, outputs, normalise)
        balance = config.balance
        default = 0.01 if balance.weight is None else balance.weight
        self.loss_weight = default if balance.type == "loss" else 0.0
        self.rate = (0.001 if balance.rate is None else balance.rate) if balance.type == "bias" else 0.0
        if self.rate:
            # whole ticks: a float buffer would be rounded away by an engine that casts the model to bf16
            self.register_buffer("ticks", torch.zeros(outputs, dtype=torch.int64))

    @classmethod
    def check_experts(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        assert isinstance(config, TokenChoiceRouter.Config)
        if config.top_k > experts + noop:
            raise ConfigError(
                f"{path}.top_k: {config.top_k} of {experts + noop} experts; a token takes at most as many as there are"
            )

    def ranking(self, scores: Tensor) -> Tensor:
        """The scores, balancing biases included; they count for choosing alone."""
        return scores + self.ticks * self.rate if self.rate else scores

    def observe(self, x: Tensor, scores: Tensor, selection: ExpertSelection, candidates: Candidates) -> None:
        trace = candidates.context.trace
        if trace is None or not self.training:
            return
        if self.loss_weight:
            trace.add_penalty(self.name, self.loss_weight * balance_loss(scores, selection))
        if self.rate:
            trace.add_update(self.name, {"rows": selection.sizes(torch.float64)})

    def update(self, statistics: Mapping[str, Tensor], step: int) -> None:
        """Move each bias one tick: up where the expert had fewer rows than the mean, down where more.

        Args:
            statistics: `rows` (outputs,) of each expert in the whole step.
        """
        if "rows" in statistics:
            rows = statistics["rows"]
            self.ticks += torch.sign(rows.sum() - rows * self.outputs).to(self.ticks)  # integers: exact


def balance_loss(scores: Tensor, selection: ExpertSelection) -> Tensor:
    """E · Σ fᵢ Pᵢ over the n tokens of scores (n, E); 0, joined to the graph, where there are none.

    f is not part of the gradient. Sigmoid scores are divided by their sum over the experts first.
    """
    tokens, experts = scores.shape
    share = selection.sizes(scores.dtype) / max(1, selection.token.shape[0])
    probability = scores / scores.sum(1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return experts * (share * probability.sum(0)).sum() / max(1, tokens)
