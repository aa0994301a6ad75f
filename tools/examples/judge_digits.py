"""What a model trained on the digits can do: name held-out digits, and draw digits that a classifier recognises."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from pretrain.data import Data
from tools.examples.captions import decoded, draw, scores
from tools.examples.make_digits import NAMES, SHIFTS, load_digits_split, shift
from zoo.carries import Ids
from zoo.model import Model
from zoo.sampling import Sampling
from zoo.slots import Objective

SAMPLES = 20
"""Drawings of each digit."""
TEMPERATURE = 0.8
NEAR = 1.0
"""Pictures that differ by less, in grey levels of 16, are copies."""


@dataclasses.dataclass(frozen=True)
class Drawings:
    """`SAMPLES` drawings of each digit."""

    digits: np.ndarray
    """(n,) the digit that was asked for."""
    content: np.ndarray
    """(n, positions, …) what the positions of each carry."""
    images: np.ndarray
    """(n, 8, 8) uint8."""


def evaluate(
    model: Model, data: Data, objective: Objective, seed: int, sampling: Sampling
) -> tuple[dict[str, Any], Drawings]:
    """The summary's figures about reading and drawing, and the drawings they are about.

    Args:
        sampling: how pictures are drawn that are vectors; those that are ids are drawn at `TEMPERATURE` and at 1.
    """
    train_images, train_labels, images, labels = load_digits_split()
    judge = SVC().fit(train_images.reshape(len(train_images), -1) / 255.0, train_labels)
    shifted = np.concatenate([train_images] + [np.stack([shift(i, *by) for i in train_images]) for by in SHIFTS])
    encode, ids = data.modalities["image"].encode, isinstance(data.grammars["image"].carries, Ids)
    known = {tuple(encode(image)) for image in shifted} if ids else None
    reconstructed = decoded(data, np.stack([encode(image) for image in images]))[..., 0]
    drawings = draw_digits(model, data, objective, TEMPERATURE if ids else sampling, seed)
    summary = {
        "image_to_caption_accuracy": float((scores(model, data, images, NAMES).argmax(1) == labels).mean()),
        "caption_to_image_agreement": _agreement(judge, drawings),
        "classifier_accuracy_on_held_out": float((judge.predict(_flat(images)) == labels).mean()),
        "classifier_accuracy_on_held_out_as_tokens": float((judge.predict(_flat(reconstructed)) == labels).mean()),
        "distinct_share": len({each.tobytes() for each in drawings.images}) / len(drawings.images),
        "training_copies": _copies(drawings.content, drawings.images, known, shifted),
        "held_out_copies": _copies(np.stack([encode(image) for image in images]), images, known, shifted),
        "nearest_training_distance": _nearest(drawings.images, train_images),
        "nearest_training_distance_of_held_out": _nearest(reconstructed, train_images),
    }
    if ids:
        warmer = draw_digits(model, data, objective, 1.0, seed)
        summary["caption_to_image_agreement_at_temperature_1"] = _agreement(judge, warmer)
    return summary, drawings


def draw_digits(model: Model, data: Data, objective: Objective, sampling: Sampling | float, seed: int) -> Drawings:
    """`SAMPLES` images for each caption."""
    generator = torch.Generator().manual_seed(seed)
    content = [draw(model, data, objective, [name] * SAMPLES, sampling, generator) for name in NAMES]
    digits, together = np.repeat(np.arange(len(NAMES)), SAMPLES), np.concatenate(content)
    return Drawings(digits, together, decoded(data, together)[..., 0])


def _copies(content: np.ndarray, images: np.ndarray, known: set[tuple[int, ...]] | None, training: np.ndarray) -> float:
    """Share of pictures that are copies of a training picture: of the same ids, or, where pictures are no ids, nowhere
    further from it than `NEAR` of the grey levels of the data, in the root mean square of its pixels."""
    if known is not None:
        return float(np.mean([tuple(ids) in known for ids in content]))
    pixels = images[0].size
    return float((_distances(images, training) < NEAR * pixels**0.5).mean())


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _agreement(judge: SVC, drawings: Drawings) -> float:
    return float((judge.predict(_flat(drawings.images)) == drawings.digits).mean())


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest training image, in the data's own units (0..16 a pixel)."""
    return float(_distances(images, training).mean())


def _distances(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """(n,) Euclidean distance of each image to the nearest of `training`, in the data's own units."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) * (16 / 255) for x in (images, training))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squared, 0).min(1))
