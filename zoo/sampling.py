"""Drawing an item from noise: what stands before it is computed once, the item itself, whole, at every step.

A model that is trained by `zoo.objectives.denoising` writes text until it has written a begin marker. Then

    prefix = Prefix.of(model, tokens, modality, room=100)  # what has been read and written, to the begin marker
    vectors = draw_item(model, grammar, prefix, objective.process, Sampling(), noise)
    prefix.read_item(model, grammar, vectors)              # the finished item, without noise
    prefix.read(model, end, text)                          # the end marker is never left to chance; then text again

What the model has seen lies in the prefix's states; nothing of the steps remains there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from zoo.config import Config
from zoo.context import CAUSAL, TokenContext
from zoo.modalities.grammar import Grammar
from zoo.model import Model
from zoo.objectives.processes import Process
from zoo.states import State

LATEST = 1 - 1e-3
"""The time at which drawing begins: just before pure noise, of which diffusion cannot say what data it holds."""


class Sampling(Config):
    """How an item is drawn."""

    steps: int = Field(50, gt=0)
    """Steps from noise to data, equally long in time. Transfusion takes 250."""
    guidance: float = Field(1.0, ge=0)
    """w of classifier-free guidance (arXiv 2207.12598): u + w (c − u), of predictions c with and u without what stands
    before the item. 1: without guidance. The model must have been trained with `drop_context`."""
    eta: float = Field(0.0, ge=0, le=1)
    """Fresh noise in every step: 0 none (DDIM, arXiv 2010.02502; Euler for rectified flow), 1 as much as DDPM."""
    clip: float | None = Field(None, gt=0)
    """What the numbers of an item lie within, −clip to clip, at every step: 1 for pixels; null where they are
    unbounded."""


@dataclasses.dataclass
class Prefix:
    """What each of B rows holds so far: one document, and the states that have seen it."""

    states: Sequence[State | None]
    rows: int
    length: int
    """Columns that the states have seen, padding included."""

    @classmethod
    def of(cls, model: Model, tokens: Tensor, modality: Tensor, room: int) -> Prefix:
        """Read the beginning of each row.

        Args:
            tokens, modality: (B, T); −1 for padding on the left, as in `zoo.generate`.
            room: how many more columns will follow.
        """
        prefix = cls(model.init_state(len(tokens), tokens.shape[1] + room), len(tokens), 0)
        prefix.read(model, tokens, modality)
        return prefix

    @torch.no_grad()
    def read(self, model: Model, tokens: Tensor, modality: Tensor) -> Tensor:
        """Go on with tokens (B, T) that carry ids; returns the logits (B, T, V)."""
        logits = model(tokens, self._context(model, modality), self.states)
        self.length += tokens.shape[1]
        return logits

    @torch.no_grad()
    def read_item(self, model: Model, grammar: Grammar, content: Tensor) -> Tensor:
        """Go on with an item a row, without noise: content (B, n, width); returns the logits (B, n, V)."""
        count = content.shape[1]
        logits = self._item(model, grammar, content, self.states)[0]
        self.length += count
        return logits

    @torch.no_grad()
    def denoise(self, model: Model, grammar: Grammar, mixture: Tensor, time: Tensor) -> Tensor:
        """What the head says of an item that would come next, of which nothing is remembered.

        Args:
            mixture: (B, n, width).
            time: scalar, from 0 (data) to 1 (noise).
        Returns:
            (B, n, width).
        """
        states = [None if state is None else state.clone() for state in self.states]
        return self._item(model, grammar, mixture, states, time)[1]

    def _item(
        self,
        model: Model,
        grammar: Grammar,
        content: Tensor,
        states: Sequence[State | None],
        time: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of the positions of an item, and what its head says there."""
        rows, count, _ = content.shape
        kind = torch.full((rows, count), grammar.choice.modality, device=content.device)
        context = self._context(model, kind, item=torch.zeros_like(kind))
        name = model.modalities[grammar.choice.modality]
        logits, predicted = model(
            torch.full_like(kind, grammar.choice.start),
            context,
            states,
            {name: content.flatten(0, 1)},
            time=None if time is None else {name: time.expand(rows * count)},
            read={other: context.index(model.modalities.index(other)) for other in model.heads},
        )
        return logits, predicted[name].unflatten(0, (rows, count))

    def _context(self, model: Model, modality: Tensor, item: Tensor | None = None) -> TokenContext:
        position = (self.length + torch.arange(modality.shape[1], device=modality.device)).expand(modality.shape)
        return TokenContext.from_modality(
            modality, position=position, modalities=model.modalities, routing=CAUSAL, item=item
        )


@torch.no_grad()
def draw_item(
    model: Model,
    grammar: Grammar,
    prefix: Prefix,
    process: Process,
    sampling: Sampling,
    noise: Tensor,
    without: Prefix | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw an item for each row, to stand next after `prefix`, which is left as it is.

    Args:
        grammar: of the item's modality.
        noise: (B, n, width) normal; what is drawn is a function of it where `sampling.eta` is 0.
        without: what the rows would hold without a caption, such as the begin marker alone; guidance needs it.
        generator: of fresh noise, where `sampling.eta` is not 0; on the noise's device.
    Returns:
        (B, n, width).
    Raises:
        ValueError: guidance without `without`.
    """
    if sampling.guidance != 1 and without is None:
        raise ValueError(f"guidance {sampling.guidance} compares with what would be drawn `without` a caption; give it")
    times = torch.linspace(1, 0, sampling.steps + 1, device=noise.device, dtype=noise.dtype).clamp_max(LATEST)
    mixture = noise
    for time, after in zip(times[:-1], times[1:], strict=True):
        prediction = prefix.denoise(model, grammar, mixture, time).to(mixture.dtype)
        if sampling.guidance != 1 and without is not None:
            plain = without.denoise(model, grammar, mixture, time).to(mixture.dtype)
            prediction = plain + sampling.guidance * (prediction - plain)
        mixture = _step(process, mixture, prediction, time, after, sampling, generator)
    return mixture


def _step(
    process: Process,
    mixture: Tensor,
    prediction: Tensor,
    time: Tensor,
    after: Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
) -> Tensor:
    """From a mixture at `time` to one at `after`, earlier: DDIM (arXiv 2010.02502, eq. 12), of which Euler's step along
    a straight line is a case."""
    data, believed = process.split(mixture, prediction, time)
    now, then = process.scales(time), process.scales(after)
    if sampling.clip is not None:
        data = data.clamp(-sampling.clip, sampling.clip)
        believed = (mixture - now.data * data) / now.noise
    if not sampling.eta:
        return then.data * data + then.noise * believed
    ratio = (now.data / then.data).square()
    fresh = sampling.eta * then.noise * ((1 - ratio * (then.noise / now.noise).square()).clamp_min(0)).sqrt()
    drawn = torch.randn(mixture.shape, generator=generator, device=mixture.device, dtype=mixture.dtype)
    return then.data * data + (then.noise.square() - fresh.square()).clamp_min(0).sqrt() * believed + fresh * drawn
