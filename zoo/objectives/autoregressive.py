"""Next-token prediction over everything alike, with z-loss (Chameleon, arXiv 2405.09818 §2.3).

Ids are predicted by cross-entropy; vectors and channels by whatever loss their head has.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.batch import Batch
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.heads import HeadConfig, IdHead, wide
from zoo.registry import BlockConfig, Place, register
from zoo.slots import Objective

Z_LOSS = "z_loss"
LENGTH = "_length"
"""Suffix of the part that says how well it is known whether another position of an item follows."""


@register("objective", "autoregressive")
class Autoregressive(Objective, counter_noise=True):
    """What the next position of the same document carries. A loss belongs to the modality of the token predicted.

    Parts: one a modality; for each whose items end where they like (`HeadConfig.open_ended`) also the cross-entropy of
    whether another position follows, which counts as the modality's; and the z-loss.
    """

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
            for modality in place.bidirectional:
                raise ConfigError(
                    f"{path}.type: 'autoregressive' predicts every position from those before it, but a position of "
                    f"modalities.{modality} sees all of its item; make its mask causal, or choose another objective"
                )

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.modalities = place.modalities
        self.weights = {modality: config.weights.get(modality, 1.0) for modality in place.modalities}
        self.z_loss = config.z_loss
        self.heads = {name: head for name, head in place.heads.items() if isinstance(head, HeadConfig)}
        self.open_ended = [name for name, head in self.heads.items() if head.open_ended]
        regulariser = [Z_LOSS] if self.z_loss else []
        self.parts = (*self.modalities, *(name + LENGTH for name in self.open_ended), *regulariser)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Target tokens of each modality, and of the z-loss those that are ids."""
        modality = batch.context.modality[:, 1:][_is_target(batch.context)]
        counts = {name: int((modality == m).sum()) for m, name in enumerate(self.modalities)}
        counts |= {name + LENGTH: counts[name] for name in self.open_ended}
        if self.z_loss:
            counts[Z_LOSS] = sum(counts[name] for m, name in enumerate(self.modalities) if self._has_ids(m))
        return counts

    def _has_ids(self, modality: int) -> bool:
        """The head of the ids learns what follows where a token of this modality does."""
        return self.modalities[modality] not in self.heads or self.modalities[modality] in self.open_ended

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums of cross-entropies in nats, of the losses of heads, and of log² Z."""
        context, sums = batch.context, {}
        is_target = _is_target(context)
        if self.heads:
            before = {name: self._before(context, name) for name in self.heads}
            logits, predictions = model(batch.tokens, context, content=batch.content, read=before)
            sums = {
                name: self._head_loss(name, prediction, batch, is_target) for name, prediction in predictions.items()
            }
        else:
            logits = model(batch.tokens, context)
        modality = context.modality[:, 1:]
        for m in range(len(self.modalities)):
            if not self._has_ids(m):
                is_target = is_target & (modality != m)
        logits = wide(logits[:, :-1].reshape(-1, logits.shape[-1]))
        target, modality = torch.where(is_target, batch.tokens[:, 1:], -100).reshape(-1), modality.reshape(-1)
        losses = IdHead.Config().loss(logits, target)
        for m, name in enumerate(self.modalities):
            if self._has_ids(m):
                of_modality = (target >= 0) & (modality == m)
                sums[name + LENGTH if name in self.heads else name] = losses.masked_fill(~of_modality, 0.0).sum()
        if self.z_loss:
            log_z = logits.logsumexp(-1).masked_fill(target < 0, 0.0)
            sums[Z_LOSS] = log_z.square().sum()
        return sums

    def _before(self, context: TokenContext, name: str) -> Tensor:
        """Flat positions that stand before those of a modality."""
        return (context.index(self.modalities.index(name)) - 1).clamp_min(0)

    def _head_loss(self, name: str, prediction: Tensor, batch: Batch, is_target: Tensor) -> Tensor:
        """The sum of a head's losses over the targets among the positions of its modality."""
        losses = self.heads[name].loss(prediction, batch.content[name])
        flat = nn.functional.pad(is_target, (1, 0)).reshape(-1)
        kept = flat.index_select(0, batch.context.index(self.modalities.index(name)))
        return losses.masked_fill(~kept, 0.0).sum()

    def combine(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
        """Σ w·S / Σ w·N over modalities + z_loss · S_z / N_z."""
        weighted = max(sum(self.weights[name] * counts[name] for name in self.modalities), 1e-9)
        loss = sum(self.weights[name] * sums[name] for name in self.modalities)
        loss = loss + sum(self.weights[name] * sums[name + LENGTH] for name in self.open_ended)
        loss = loss / weighted
        if self.z_loss:
            loss = loss + self.z_loss * sums[Z_LOSS] / max(counts[Z_LOSS], 1)
        return loss  # type: ignore[return-value]

    def report(self, sums: Mapping[str, float], counts: Mapping[str, float], training: bool) -> dict[str, float]:
        """Means of the parts; the z-loss as `z`, in training alone."""
        means = super().report(sums, counts, training)
        z = means.pop(Z_LOSS, None)
        return means | {"z": z} if training and z is not None else means


def _is_target(context: TokenContext) -> Tensor:
    """(B, T − 1) bool: token t + 1 continues the document of token t."""
    document = context.document
    return (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
