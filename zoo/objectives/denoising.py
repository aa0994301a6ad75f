"""Two objectives that denoise whole items while everything else is predicted from left to right: Transfusion
(arXiv 2408.11039) and rectified flow. They differ in the process alone (`zoo.objectives.processes`).

An item is what its modality calls bidirectional: an image, whose positions all see each other. Every item is mixed with
noise, as much as the time says that is drawn for it; the model is told the time, and at the item's own positions its
head predicts what `Process.target` says. Noise and times are functions of the tokens' keys (`zoo.noise`), so that they
depend neither on ranks nor on how a step is cut.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from zoo import noise
from zoo.batch import Batch
from zoo.carries import Vectors
from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.heads import HeadConfig
from zoo.objectives.autoregressive import Autoregressive, terms_at
from zoo.objectives.processes import Diffusion, Process, RectifiedFlow
from zoo.registry import Place, register
from zoo.slots import Objective, TimedStem
from zoo.spans import Span

GRID = 5
"""Classes of times that losses are reported by; evaluation draws no other times than the middle of each."""
MARKERS = 2
"""Tokens that stand round whatever a document holds first and last: the document's marker and the item's."""


class DenoisingConfig(Autoregressive.Config):
    """What the objectives that denoise items have in common. `weights` and `z_loss` are of what is not denoised."""

    denoising_weight: float = Field(5.0, ge=0)
    """λ: weight of an item's loss, averaged over items, beside a token's, averaged over tokens (Transfusion: 5)."""
    limit_before_caption: float = Field(1.0, gt=0, le=1)
    """The largest time of an item that stands first in its document and is followed by something else, such as a
    caption, which can hardly be learned from noise; 0.5 in Transfusion's ablation (§4.3), 1 for no limit."""
    drop_context: float = Field(0.0, ge=0, le=1)
    """Share of items that are cut off from what stands before them in their document, together with what follows, so
    that a model also learns to draw without a caption, as classifier-free guidance needs. In training alone."""

    def check(self, place: Place, path: str) -> None:
        self.check_weights(place, path)
        if not place.bidirectional:
            raise ConfigError(
                f"{path}.type: {self.type_name!r} denoises items whose positions all see each other, and no modality "
                "has such items; use one that carries vectors under a bidirectional mask, such as {type: "
                "continuous_patches, mask: bidirectional}, or another objective"
            )
        for name in place.bidirectional:
            if name in self.weights:
                raise ConfigError(
                    f"{path}.weights.{name}: its items are denoised, and {path}.denoising_weight weighs them"
                )
            head, stem = place.heads.get(name), place.stems.get(name)
            carries = head.carries if isinstance(head, HeadConfig) else None
            if not isinstance(carries, Vectors):
                raise ConfigError(
                    f"{path}.type: {self.type_name!r} puts noise on vectors, but positions of modalities.{name} carry "
                    f"{carries or 'ids'}; use a kind that carries vectors, or make its mask causal"
                )
            if stem is not None and not issubclass(stem.block, TimedStem):
                raise ConfigError(
                    f"model.stem.{name}.type: {stem.type_name!r} cannot be told how much noise there is, as {path} "
                    "needs; remove the key, or use noisy_vectors"
                )


@dataclasses.dataclass(frozen=True)
class Noisy:
    """The items of a modality, mixed with noise. n positions, in row and time order."""

    mixture: Tensor
    """(n, width) what the model is given."""
    time: Tensor
    """(n,) fp32, the same for all positions of an item."""
    target: Tensor
    """(n, width) what is to be predicted."""


@dataclasses.dataclass(frozen=True)
class Times:
    """The times of the items of a modality, one for each of its n positions."""

    first: Tensor
    """(n,) which of the n positions is the first of its item."""
    size: Tensor
    """(n,) positions of its item."""
    time: Tensor
    """(n,) fp32, from 0 to 1."""
    column: Tensor
    """(n,) int64, which class of times it is in, from 0 to `GRID` − 1; −1 for an item whose time is limited."""

    @property
    def begins(self) -> Tensor:
        """(n,) bool: the first position of an item."""
        return self.first == torch.arange(len(self.first), device=self.first.device)


class Denoising(Objective, abc.ABC):
    """Items of bidirectional modalities by the mean squared error of `Process.target`, everything else as
    `Autoregressive`: no position of an item is a target of that one, nor is what follows a position of an item.

    Parts: those of `Autoregressive`; for each modality that is denoised the sum over items of the mean over an item's
    numbers; and the same by classes of times, `image@0.50` being the items whose time is about 0.50.
    """

    tells_terms = True

    def __init__(self, config: DenoisingConfig, place: Place) -> None:
        super().__init__()
        self.next = Autoregressive(config, place)
        self.process = self.make_process(config)
        self.config = config
        self.modalities = place.modalities
        self.heads = {name: head for name in place.bidirectional if isinstance(head := place.heads[name], HeadConfig)}
        middles = (torch.arange(GRID) + 0.5) / GRID
        self.grid = self.process.time(middles, torch.ones(GRID)).tolist()
        self.parts = (*self.next.parts, *self.heads, *(self._at(name, k) for name in self.heads for k in range(GRID)))

    @staticmethod
    @abc.abstractmethod
    def make_process(config: DenoisingConfig) -> Process:
        """The process that a config of this objective asks for."""

    def _at(self, name: str, column: int) -> str:
        """The part for the items of a modality in a class of times."""
        return f"{name}@{self.grid[column]:.2f}"

    # -------------------------------------------------------------------------------------------------- what is noised

    def prepare(self, batch: Batch) -> Batch:
        """The batch in which `drop_context` of the items stand in documents of their own."""
        if not self.config.drop_context or not batch.context.item_spans:
            return batch
        context = batch.context
        salt = noise.salt("objective.context", context.step)
        alone = noise.uniform(context.key, salt, 1)[..., 0] < self.config.drop_context
        alone &= context.position > MARKERS  # before others nothing but markers stands
        cuts = [span for span in context.item_spans if bool(alone[span[0], span[1]])]
        return dataclasses.replace(batch, context=_cut(context, cuts)) if cuts else batch

    def times(self, context: TokenContext, name: str) -> Times:
        """When the items of a modality are; in evaluation (`eval()`) in the middle of a class of times."""
        number = self.modalities.index(name)
        places = context.index(number)
        first, size = _items(context, places, name)
        key = context.key.reshape(-1).index_select(0, places.index_select(0, first))
        share = noise.uniform(key, noise.salt(f"objective.{name}.time", context.step), 1)[:, 0]
        column = (share * GRID).long().clamp_max(GRID - 1)
        limit = torch.where(_captioned(context, places, first, size), self.config.limit_before_caption, 1.0)
        time = self.process.time(share if self.training else (column + 0.5) / GRID, limit)
        return Times(first, size, time, torch.where(limit < 1, -1, column))

    def noisy(self, batch: Batch, name: str, times: Times) -> Noisy:
        """The items of a modality as the model sees them, and what it is to make of them."""
        data, context = batch.content[name], batch.context
        key = context.key.reshape(-1).index_select(0, context.index(self.modalities.index(name)))
        salt = noise.salt(f"objective.{name}.noise", context.step)
        drawn = noise.normal(key, salt, data.shape[-1]).to(data.dtype)
        mixture = self.process.mix(data, drawn, times.time.to(data.dtype).unsqueeze(-1))
        return Noisy(mixture, times.time, self.process.target(data, drawn))

    # ----------------------------------------------------------------------------------------------------- the loss

    def counts(self, batch: Batch) -> dict[str, int]:
        """Terms of `Autoregressive`, and items."""
        counts = self.next.counts(batch)
        for name in self.heads:
            times = self.times(batch.context, name)
            column = times.column[times.begins]
            counts[name] = len(column)
            counts |= {self._at(name, k): int((column == k).sum()) for k in range(GRID)}
        return counts

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Sums of the terms. Noise is mixed in here, by the tokens' keys: an evaluation's are always the same."""
        context = batch.context
        times = {name: self.times(context, name) for name in self.heads}
        noisy = {name: self.noisy(batch, name, times[name]) for name in self.heads}
        target = self.next.target(batch)
        losses, predictions = model(
            batch.tokens,
            context,
            content={**batch.content, **{name: each.mixture for name, each in noisy.items()}},
            time={name: each.time for name, each in noisy.items()},
            read=self.next.before(context) | {name: context.index(self.modalities.index(name)) for name in self.heads},
            target=target,
            log_z=self.next.z_loss > 0,
        )
        sums = self.next.sums(losses, predictions, batch, target)
        for name, head in self.heads.items():
            errors = head.loss(predictions[name], noisy[name].target) / times[name].size
            sums[name] = errors.sum()
            if context.trace is not None:
                places, begins = context.index(self.modalities.index(name)), times[name].begins
                context.trace.add_terms(name, functools.partial(terms_at, context, places, errors, begins))
            for k in range(GRID):
                sums[self._at(name, k)] = errors.detach().masked_fill(times[name].column != k, 0.0).sum()
        return sums

    def combine(self, sums: Mapping[str, Tensor], counts: Mapping[str, float]) -> Tensor:
        """The loss of `Autoregressive` + λ · Σ over denoised modalities of the mean over their items."""
        loss = self.next.combine(sums, counts)
        for name in self.heads:
            loss = loss + self.config.denoising_weight * sums[name] / max(counts[name], 1)
        return loss

    def report(self, sums: Mapping[str, float], counts: Mapping[str, float], training: bool) -> dict[str, float]:
        """Means of the parts, those of `Autoregressive` as it says them."""
        own = (name for name in self.parts if name not in self.next.parts and counts[name])
        return self.next.report(sums, counts, training) | {name: sums[name] / counts[name] for name in own}

    def constant_loss(self, modality: str, error: float) -> float:
        return self.process.constant_loss(error) if modality in self.heads else error


@register("objective", "transfusion")
class Transfusion(Denoising, counter_noise=True):
    """Items by diffusion (DDPM): the noise in them is predicted."""

    class Config(DenoisingConfig):
        steps: int | None = Field(1000, gt=0)
        """T, how many times there are; null: every time from 0 to 1."""

    @staticmethod
    def make_process(config: Config) -> Diffusion:  # pyrefly: ignore[bad-override]
        return Diffusion(config.steps)


@register("objective", "flow")
class Flow(Denoising, counter_noise=True):
    """Items by rectified flow: the velocity from data to noise is predicted."""

    class Config(DenoisingConfig):
        times: Literal["logit_normal", "uniform"] = "logit_normal"
        """How times are distributed: "logit_normal" has most in the middle (arXiv 2403.03206 §3.1)."""
        shift: float = Field(1.0, gt=0)
        """s: a time t becomes s t / (1 + (s − 1) t); above 1 noise is more frequent, as large images need."""

    @staticmethod
    def make_process(config: Config) -> RectifiedFlow:  # pyrefly: ignore[bad-override]
        return RectifiedFlow(config.times, config.shift)


def _items(context: TokenContext, places: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """For each of n flat places of a modality which of the n begins its item, (n,), and the item's size, (n,)."""
    count = torch.arange(len(places), device=places.device)
    if context.item is None:
        if len(places):
            raise ValueError(
                f"context: positions of {name} belong to no item; give from_modality(…, item=…), one time is drawn an "
                "item"
            )
        return count, count
    columns = context.shape[1]
    item = context.item.reshape(-1).index_select(0, places) + (places // columns) * columns
    begins = nn.functional.pad(item[1:] != item[:-1], (1, 0), value=True)[: len(places)]
    first = torch.where(begins, count, 0).cummax(0).values
    return first, torch.zeros_like(count).index_add(0, first, torch.ones_like(count)).index_select(0, first)


def _captioned(context: TokenContext, places: Tensor, first: Tensor, size: Tensor) -> Tensor:
    """(n,) bool: the item of each place stands first in its document, and something else follows it there."""
    columns, begin = context.shape[1], places.index_select(0, first)
    leads = context.position.reshape(-1).index_select(0, begin) <= MARKERS
    after = begin % columns + size + MARKERS  # where nothing follows, the document is over
    document = context.document.reshape(-1)
    follower = document.index_select(0, begin - begin % columns + after.clamp_max(columns - 1))
    return leads & (after < columns) & (follower == document.index_select(0, begin))


def _cut(context: TokenContext, items: list[Span]) -> TokenContext:
    """The context, on the host, whose documents are cut before the begin marker of each of `items`."""
    begins = torch.zeros(context.shape, dtype=torch.int64)
    for row, start, _ in items:
        begins[row, max(start - 1, 0)] = 1
    # documents keep their order; a cut makes a new number between two old ones
    ids = context.document * (context.shape[1] + 1) + begins.cumsum(1)
    document = torch.where(context.document < 0, -1, ids)
    return TokenContext.from_modality(
        context.modality,
        document,
        context.position,
        modalities=context.modalities,
        step=context.step,
        routing=context.routing,
        trace=context.trace,
        key=context.key,
        item=context.item,
    )
