"""Next-token prediction over text and discrete image tokens alike, with z-loss (Chameleon, arXiv 2405.09818 §2.3)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.registry import BlockConfig, Place, register
from zoo.slots import Objective

Z_LOSS = "z_loss"


class Batch(Protocol):
    """What an objective is given."""

    @property
    def tokens(self) -> Tensor:
        """(B, T) int64."""

    @property
    def context(self) -> TokenContext:
        """Of the tokens."""


@register("objective", "autoregressive")
class Autoregressive(Objective, counter_noise=True):
    """Cross-entropy of the next token of the same document. A loss belongs to the modality of the token predicted."""

    class Config(BlockConfig):
        weights: dict[str, float] = Field(default_factory=dict)
        """Weight of each modality's tokens; 1 where nothing is said."""
        z_loss: float = Field(0.0, ge=0)
        """Coefficient of log² Z, averaged over the same positions as the cross-entropy; Chameleon has 1e-5."""

        def check(self, place: Place, path: str) -> None:
            for modality, weight in self.weights.items():
                place.check_modality(modality, f"{path}.weights.{modality}")
                if weight < 0:
                    raise ConfigError(f"{path}.weights.{modality}: {weight} is negative; a weight is 0 or more")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.modalities = place.modalities
        self.weights = {modality: config.weights.get(modality, 1.0) for modality in place.modalities}
        self.z_loss = config.z_loss

    def counts(self, context: TokenContext) -> dict[str, int]:
        """Target tokens of each modality in a batch, from the context alone; on the host if the context is."""
        modality = context.modality[:, 1:][_is_target(context)]
        return {name: int((modality == m).sum()) for m, name in enumerate(self.modalities)}

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{modality: (sum of cross-entropies in nats, targets)}, and `z_loss` where it is on; sums are fp32, joined to the
        graph even where a modality has no target."""
        context = batch.context
        logits = model(batch.tokens, context)[:, :-1]
        target = torch.where(_is_target(context), batch.tokens[:, 1:], -100)
        logits = logits.reshape(-1, logits.shape[-1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, target.reshape(-1), reduction="none")
        is_target = target.reshape(-1) >= 0
        modality = context.modality[:, 1:].reshape(-1)
        parts = {}
        for m, name in enumerate(self.modalities):
            of_modality = is_target & (modality == m)
            parts[name] = (losses.masked_fill(~of_modality, 0.0).sum(), of_modality.sum())
        if self.z_loss:
            log_z = logits.logsumexp(-1).masked_fill(~is_target, 0.0)
            parts[Z_LOSS] = (log_z.square().sum(), is_target.sum())
        return parts

    def combine(self, sums: dict[str, Tensor], counts: dict[str, float]) -> Tensor:
        """One loss from the parts' sums.

        Args:
            sums: of a micro-batch, a rank or all ranks.
            counts: target tokens of each modality over the *whole step* on all ranks.
        Returns:
            Σ w·S / Σ w·N over modalities + z_loss · S_z / N; linear in `sums`, so micro-batches add up.
        """
        weighted = max(sum(self.weights[name] * counts[name] for name in self.modalities), 1e-9)
        loss = sum(self.weights[name] * sums[name] for name in self.modalities) / weighted
        if self.z_loss:
            loss = loss + self.z_loss * sums[Z_LOSS] / max(sum(counts[name] for name in self.modalities), 1)
        return loss  # type: ignore[return-value]


def _is_target(context: TokenContext) -> Tensor:
    """(B, T − 1) bool: token t + 1 continues the document of token t."""
    document = context.document
    return (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
