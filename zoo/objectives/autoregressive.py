"""Next-token prediction over everything alike, with z-loss (Chameleon, arXiv 2405.09818 §2.3).

Ids are predicted by cross-entropy; vectors and channels by whatever loss their head has. An objective that predicts
some modalities otherwise (`zoo.objectives.denoising`) uses this one for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo.batch import Batch
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.cross_entropy import TokenLosses
from zoo.heads import HeadConfig
from zoo.registry import BlockConfig, Place, register
from zoo.slots import Objective
from zoo.trace import Terms

Z_LOSS = "z_loss"
LENGTH = "_length"
"""Suffix of the part that says how well it is known whether another position of an item follows."""


def terms_at(context: TokenContext, places: Tensor, losses: Tensor, counted: Tensor) -> Terms:
    """Terms of the n flat positions `places` alone; `losses` and `counted` are (n,)."""
    whole = losses.new_zeros(context.shape).reshape(-1).index_copy(0, places, losses)
    where = torch.zeros_like(whole, dtype=torch.bool).index_copy(0, places, counted)
    return Terms(whole.reshape(context.shape), where.reshape(context.shape))


@register("objective", "autoregressive")
class Autoregressive(Objective, counter_noise=True):
    """What the next position of the same document carries. A loss belongs to the modality of the token predicted.

    Parts: one a modality; for each whose items end where they like (`HeadConfig.open_ended`) also the cross-entropy of
    whether another position follows, which counts as the modality's; and the z-loss.
    """

    tells_terms = True

    class Config(BlockConfig):
        weights: dict[str, float] = Field(default_factory=dict)
        """Weight of each modality's tokens; 1 where nothing is said."""
        z_loss: float = Field(0.0, ge=0)
        """Coefficient of log² Z, averaged over the same positions as the cross-entropy; Chameleon has 1e-5."""

        def check(self, place: Place, path: str) -> None:
            self.check_weights(place, path)
            for modality in place.bidirectional:
                raise ConfigError(
                    f"{path}.type: 'autoregressive' predicts every position from those before it, but a position of "
                    f"modalities.{modality} sees all of its item; make its mask causal, or choose an objective that "
                    "denoises whole items: transfusion or flow"
                )

        def check_weights(self, place: Place, path: str) -> None:
            """Raise `ConfigError` for a weight of a modality that is not there, or below 0."""
            for modality, weight in self.weights.items():
                place.check_modality(modality, f"{path}.weights.{modality}")
                if weight < 0:
                    raise ConfigError(f"{path}.weights.{modality}: {weight} is negative; a weight is 0 or more")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.modalities = {name: m for m, name in enumerate(place.modalities) if name not in place.bidirectional}
        self.apart = [m for m, name in enumerate(place.modalities) if name in place.bidirectional]
        self.weights = {modality: config.weights.get(modality, 1.0) for modality in self.modalities}
        self.z_loss = config.z_loss
        heads = {name: head for name, head in place.heads.items() if name in self.modalities}
        self.heads = {name: head for name, head in heads.items() if isinstance(head, HeadConfig)}
        self.open_ended = [name for name, head in self.heads.items() if head.open_ended]
        regulariser = [Z_LOSS] if self.z_loss else []
        self.parts = (*self.modalities, *(name + LENGTH for name in self.open_ended), *regulariser)

    def counts(self, batch: Batch) -> dict[str, int]:
        """Target tokens of each modality, and of the z-loss those that are ids."""
        modality = batch.context.modality[:, 1:][self._is_target(batch.context)]
        counts = {name: int((modality == m).sum()) for name, m in self.modalities.items()}
        counts |= {name + LENGTH: counts[name] for name in self.open_ended}
        if self.z_loss:
            counts[Z_LOSS] = sum(counts[name] for name in self.modalities if self._has_ids(name))
        return counts

    def _has_ids(self, modality: str) -> bool:
        """The head of the ids learns what follows where a token of this modality does."""
        return modality not in self.heads or modality in self.open_ended

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums of cross-entropies in nats, of the losses of heads, and of log² Z."""
        target = self.target(batch)
        losses, predictions = model(
            batch.tokens,
            batch.context,
            content=batch.content,
            read=self.before(batch.context),
            target=target,
            log_z=self.z_loss > 0,
        )
        return self.sums(losses, predictions, batch, target)

    def target(self, batch: Batch) -> Tensor:
        """(B, T) the id that each position predicts, the next token's; −1 where it predicts none."""
        is_target, modality = self._is_target(batch.context), batch.context.modality[:, 1:]
        for name, m in self.modalities.items():
            if not self._has_ids(name):
                is_target = is_target & (modality != m)
        return nn.functional.pad(torch.where(is_target, batch.tokens[:, 1:], -1), (0, 1), value=-1)

    def sums(
        self, losses: TokenLosses, predictions: Mapping[str, Tensor], batch: Batch, target: Tensor
    ) -> dict[str, Tensor]:
        """As `forward`, of what the model has said.

        Args:
            losses: (B, T), of the ids that are predicted.
            predictions: what each head predicts at `before`; those of other modalities are not looked at.
            target: (B, T), as `target` gives it.
        """
        context, is_target = batch.context, self._is_target(batch.context)
        sums = {name: self._head_loss(name, predictions[name], batch, is_target) for name in self.heads}
        modality = context.modality[:, 1:]
        has_target = target[:, :-1] >= 0
        cross_entropy = losses.cross_entropy[:, :-1]
        for name, m in self.modalities.items():
            if self._has_ids(name):
                part = name + LENGTH if name in self.heads else name
                of_modality = has_target & (modality == m)
                sums[part] = self._told(part, cross_entropy.masked_fill(~of_modality, 0.0), of_modality, context).sum()
        if self.z_loss:
            assert losses.log_z is not None
            log_z = losses.log_z[:, :-1].masked_fill(~has_target, 0.0)
            sums[Z_LOSS] = self._told(Z_LOSS, log_z.square(), has_target, context).sum()
        return sums

    @staticmethod
    def _told(part: str, losses: Tensor, counted: Tensor, context: TokenContext) -> Tensor:
        """`losses` (B, T − 1) of all positions but the first of each row, after the trace has been told them."""
        if context.trace is not None:
            padded = (nn.functional.pad(each, (1, 0)) for each in (losses, counted))
            context.trace.add_terms(part, lambda: Terms(*padded))
        return losses

    def before(self, context: TokenContext) -> dict[str, Tensor]:
        """For each modality with a head of its own the flat positions that stand before its own: where it is read."""
        return {name: (context.index(self.modalities[name]) - 1).clamp_min(0) for name in self.heads}

    def _is_target(self, context: TokenContext) -> Tensor:
        """(B, T − 1) bool: token t + 1 continues the document of token t, and both are of modalities predicted here."""
        document = context.document
        is_target = (document[:, 1:] == document[:, :-1]) & (document[:, 1:] >= 0)
        for m in self.apart:
            is_target = is_target & (context.modality[:, 1:] != m) & (context.modality[:, :-1] != m)
        return is_target

    def _head_loss(self, name: str, prediction: Tensor, batch: Batch, is_target: Tensor) -> Tensor:
        """The sum of a head's losses over the targets among the positions of its modality."""
        losses = self.heads[name].loss(prediction, batch.content[name])
        flat = nn.functional.pad(is_target, (1, 0)).reshape(-1)
        places = batch.context.index(self.modalities[name])
        kept = flat.index_select(0, places)
        losses = losses.masked_fill(~kept, 0.0)
        if batch.context.trace is not None:
            batch.context.trace.add_terms(name, lambda: terms_at(batch.context, places, losses, kept))
        return losses.sum()

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
