"""Drawing an item from noise: what stands before it is computed once, the item itself, whole, at every step.

`zoo.writing` calls it when a model that is trained by `zoo.objectives.denoising` has written a begin marker. What the
model has seen lies in a `zoo.prefix.Prefix`; nothing of the steps remains there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from zoo.config import Config
from zoo.modalities.grammar import Grammar
from zoo.model import Model
from zoo.objectives.processes import Process

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


class Denoises(Protocol):
    """Something that items are drawn after."""

    def denoise(self, model: Model, grammar: Grammar, mixture: Tensor, time: Tensor) -> Tensor:
        """What the head says of an item (B, n, width) at a time, that would come next: (B, n, width)."""
        ...


@torch.no_grad()
def draw_item(
    model: Model,
    grammar: Grammar,
    prefix: Denoises,
    process: Process,
    sampling: Sampling,
    noise: Tensor,
    without: Denoises | None = None,
    fresh: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Draw an item for each row, to stand next after `prefix`, which is left as it is.

    Args:
        grammar: of the item's modality.
        noise: (B, n, width) normal; what is drawn is a function of it where `sampling.eta` is 0.
        without: what the rows would hold without a caption, such as the begin marker alone; guidance needs it.
        fresh: gives the noise of each step, as `noise`, where `sampling.eta` is not 0.
    Returns:
        (B, n, width).
    Raises:
        ValueError: guidance without `without`, or `sampling.eta` without `fresh`.
    """
    if sampling.eta and fresh is None:
        raise ValueError(f"eta {sampling.eta} adds noise in every step; give it, fresh=…")
    if sampling.guidance != 1 and without is None:
        raise ValueError(f"guidance {sampling.guidance} compares with what would be drawn `without` a caption; give it")
    times = torch.linspace(1, 0, sampling.steps + 1, device=noise.device, dtype=noise.dtype).clamp_max(LATEST)
    mixture = noise
    for step, (time, after) in enumerate(zip(times[:-1], times[1:], strict=True)):
        prediction = prefix.denoise(model, grammar, mixture, time).to(mixture.dtype)
        if sampling.guidance != 1 and without is not None:
            plain = without.denoise(model, grammar, mixture, time).to(mixture.dtype)
            prediction = plain + sampling.guidance * (prediction - plain)
        drawn = fresh(step) if sampling.eta and fresh is not None else torch.zeros_like(mixture)
        mixture = _step(process, mixture, prediction, time, after, sampling, drawn)
    return mixture


def _step(
    process: Process,
    mixture: Tensor,
    prediction: Tensor,
    time: Tensor,
    after: Tensor,
    sampling: Sampling,
    drawn: Tensor,
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
    return then.data * data + (then.noise.square() - fresh.square()).clamp_min(0).sqrt() * believed + fresh * drawn
