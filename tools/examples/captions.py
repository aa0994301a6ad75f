"""Captions and pictures both ways, for a model of either kind: pictures drawn from captions, and captions scored after
pictures. Pictures may be ids, which are chosen one by one, or vectors, which are drawn from noise as a whole."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from zoo.generate import Part
from zoo.run import Run
from zoo.sampling import Sampling


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


def draw(run: Run, captions: Sequence[str], sampling: Sampling, temperature: float, seed: int) -> np.ndarray:
    """(n, H, W, channels) uint8: one picture for each caption.

    Args:
        sampling: of vectors how they are drawn.
        temperature: at which ids are chosen.
    """
    drawn = run.generate_all(
        [[caption] for caption in captions],
        then="image",
        drawing=sampling,
        guidance=sampling.guidance,
        temperature=temperature,
        seed=seed,
        batch=128,
        progress=True,
    )
    return np.stack([picture.item for (picture,) in drawn])


def scores(run: Run, images: Sequence[Any] | np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """(images, captions) log-likelihood in nats of each caption, and of the end of the document, after each picture.

    Args:
        images: pictures as the modality `image` encodes them; None: no picture, the caption begins the document.
    """
    prompts = [[] if image is None else [Part("image", image)] for image in images]
    pairs = [(prompt, caption) for prompt in prompts for caption in captions]
    return run.log_likelihoods(pairs, batch=512).reshape(len(prompts), len(captions))
