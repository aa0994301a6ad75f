"""Captions and pictures both ways, for a model of either kind: pictures drawn from captions, and captions scored after
pictures. Pictures may be ids, which are chosen one by one, or vectors, which are drawn from noise as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.data import Data
from zoo.carries import Ids, Vectors
from zoo.context import CAUSAL, TokenContext
from zoo.generate import generate, log_likelihood
from zoo.model import Model
from zoo.objectives.denoising import Denoising
from zoo.sampling import Prefix, Sampling, draw_item
from zoo.slots import Objective

BATCH = 512
"""Rows of a forward pass."""


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Options for how pictures are drawn that are vectors."""
    group = parser.add_argument_group("drawing from noise", "for models of vectors (transfusion, flow)")
    group.add_argument("--steps", type=int, default=50, metavar="N", help="from noise to a picture (50)")
    group.add_argument("--guidance", type=float, default=1.0, metavar="W", help="of the caption; 1 is none (1)")
    group.add_argument("--eta", type=float, default=0.0, help="fresh noise: 0 DDIM or Euler, 1 DDPM (0)")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """What `add_sampling` has read.

    Raises:
        ConfigError: a value out of range.
    """
    values = {"steps": options.steps, "guidance": options.guidance, "eta": options.eta, "clip": 1.0}
    return Sampling.parse(values, "drawing")


def draw(
    model: Model,
    data: Data,
    objective: Objective,
    captions: Sequence[str],
    sampling: Sampling | float,
    generator: torch.Generator,
) -> np.ndarray:
    """One picture for each caption, as the positions of the modality `image` carry it: (n, positions, …).

    Args:
        sampling: of vectors how they are drawn, of ids the temperature.
    """
    image, prompts = data.grammars["image"], _prompts(data, captions)
    modality = torch.where(prompts < 0, -1, 0)
    tokens = prompts.clamp_min(0)
    if isinstance(image.carries, Ids):
        assert isinstance(sampling, float)
        return (generate(model, tokens, modality, image.choices(), sampling, generator) - image.choice.start).numpy()
    assert isinstance(sampling, Sampling) and isinstance(objective, Denoising)
    assert isinstance(image.carries, Vectors) and image.positions is not None and image.begin is not None
    count = image.positions.most
    noise = torch.randn(len(captions), count, image.carries.width, generator=generator)
    prefix = Prefix.of(model, tokens, modality, room=count)
    begin = torch.full((len(captions), 1), image.begin)
    without = Prefix.of(model, begin, torch.zeros_like(begin), room=count) if sampling.guidance != 1 else None
    return draw_item(model, image, prefix, objective.process, sampling, noise, without, generator).numpy()


def decoded(data: Data, content: np.ndarray) -> np.ndarray:
    """Pictures (n, H, W, channels) uint8 of what their positions carry."""
    return np.stack([data.modalities["image"].decode(each) for each in content])


def scores(model: Model, data: Data, images: Sequence[Any] | np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """(images, captions) log-likelihood in nats of each caption, and of the end of the document, after each picture.

    Args:
        images: pictures as the modality `image` encodes them; None: no picture, the caption begins the document.
    """
    words, text = data.vocabulary, data.grammars["text"]
    ends = [np.append(text.tokens(data.modalities["text"].encode(caption)), words.eos) for caption in captions]
    length = max(map(len, ends))
    padded = np.stack([np.pad(end, (0, length - len(end)), constant_values=-1) for end in ends])
    result = np.empty((len(images), len(captions)))
    step = max(1, BATCH // len(captions))
    for start in range(0, len(images), step):
        shown = [each for each in images[start : start + step] if each is not None]
        content = np.stack([data.modalities["image"].encode(each) for each in shown]) if shown else None
        prompts = np.full((max(1, len(shown)), 1), words.bos)
        if content is not None:
            prompts = np.concatenate([prompts, [data.grammars["image"].tokens(each) for each in content]], 1)
        tokens = np.concatenate([np.repeat(prompts, len(captions), 0), np.tile(padded, (len(prompts), 1))], 1)
        scored = np.zeros(tokens.shape, bool)
        scored[:, prompts.shape[1] :] = tokens[:, prompts.shape[1] :] >= 0
        chunk = _score(model, data, torch.from_numpy(tokens).long(), torch.from_numpy(scored), content, len(captions))
        result[start : start + step] = chunk.view(len(prompts), len(captions)).numpy()
    return result


def _score(
    model: Model, data: Data, tokens: Tensor, scored: Tensor, content: np.ndarray | None, repeated: int
) -> Tensor:
    """(B,) log-likelihoods of rows with a picture each, or none; content (B / repeated, positions, …)."""
    modality = torch.from_numpy(data.vocabulary.modality_of(tokens.clamp_min(0).numpy())).long()
    modality = torch.where(tokens < 0, -1, modality)
    number = data.vocabulary.modalities.index("image")
    bidirectional = data.modalities["image"].config.bidirectional
    context = TokenContext.from_modality(
        modality,
        modalities=data.vocabulary.modalities,
        routing=CAUSAL,
        item=torch.where(modality == number, 0, -1) if bidirectional and content is not None else None,
    )
    carried = {}
    if content is not None and not isinstance(data.grammars["image"].carries, Ids):
        carried = {"image": torch.from_numpy(np.repeat(content, repeated, 0)).flatten(0, 1)}
    return log_likelihood(model, tokens.clamp_min(0), context, scored, carried)


def _prompts(data: Data, captions: Sequence[str]) -> Tensor:
    """(n, T) the beginning of a document, a caption, and the picture's begin marker; −1 on the left of shorter ones."""
    text, image = data.grammars["text"], data.grammars["image"]
    assert image.begin is not None
    rows = [
        [data.vocabulary.bos, *text.tokens(data.modalities["text"].encode(caption)).tolist(), image.begin]
        for caption in captions
    ]
    longest = max(map(len, rows))
    return torch.tensor([[-1] * (longest - len(row)) + row for row in rows])
