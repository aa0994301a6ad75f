"""What a model trained on the digits can do: name held-out digits, and draw digits that a classifier recognises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.svm import SVC

from tools.examples.captions import draw, scores
from tools.examples.make_digits import NAMES, SHIFTS, load_digits_split, shift
from zoo.carries import Ids
from zoo.run import Run
from zoo.sampling import Sampling

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
    images: np.ndarray
    """(n, 8, 8) uint8."""


def evaluate(run: Run, seed: int, sampling: Sampling) -> tuple[dict[str, Any], Drawings]:
    """The summary's figures about reading and drawing, and the drawings they are about.

    Args:
        sampling: how pictures are drawn that are vectors; those that are ids are drawn at `TEMPERATURE` and at 1.
    """
    train_images, train_labels, images, labels = load_digits_split()
    judge = SVC().fit(train_images.reshape(len(train_images), -1) / 255.0, train_labels)
    shifted = np.concatenate([train_images] + [np.stack([shift(i, *by) for i in train_images]) for by in SHIFTS])
    image, ids = run.modalities["image"], isinstance(run.grammars["image"].carries, Ids)
    encode = image.encode
    known = {tuple(encode(each)) for each in shifted} if ids else None
    reconstructed = np.stack([image.decode(encode(each)) for each in images])[..., 0]
    drawings = draw_digits(run, TEMPERATURE, sampling, seed)
    summary = {
        "image_to_caption_accuracy": float((scores(run, images, NAMES).argmax(1) == labels).mean()),
        "caption_to_image_agreement": _agreement(judge, drawings),
        "classifier_accuracy_on_held_out": float((judge.predict(_flat(images)) == labels).mean()),
        "classifier_accuracy_on_held_out_as_tokens": float((judge.predict(_flat(reconstructed)) == labels).mean()),
        "distinct_share": len({each.tobytes() for each in drawings.images}) / len(drawings.images),
        "training_copies": _copies(encode, drawings.images, known, shifted),
        "held_out_copies": _copies(encode, images, known, shifted),
        "nearest_training_distance": _nearest(drawings.images, train_images),
        "nearest_training_distance_of_held_out": _nearest(reconstructed, train_images),
    }
    if ids:
        warmer = draw_digits(run, 1.0, sampling, seed)
        summary["caption_to_image_agreement_at_temperature_1"] = _agreement(judge, warmer)
    return summary, drawings


def draw_digits(run: Run, temperature: float, sampling: Sampling, seed: int) -> Drawings:
    """`SAMPLES` images for each caption."""
    captions = [name for name in NAMES for _ in range(SAMPLES)]
    images = draw(run, captions, sampling, temperature, seed)[..., 0]
    return Drawings(np.repeat(np.arange(len(NAMES)), SAMPLES), images)


def _copies(
    encode: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    known: set[tuple[int, ...]] | None,
    training: np.ndarray,
) -> float:
    """Share of pictures that are copies of a training picture: of the same ids, or, where pictures are no ids, nowhere
    further from it than `NEAR` of the grey levels of the data, in the root mean square of its pixels."""
    if known is not None:
        return float(np.mean([tuple(encode(image)) in known for image in images]))
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
