"""How good items are that a run makes from captions it never saw: what a classifier says of them, how near they are to
what it was trained on, and how far their distribution is from that of real ones.

No figure can be had by copying: beside each stands what real items get that were held out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.evaluate.data import Evaluated, described
from tools.evaluate.features import Features
from tools.evaluate.judging import (
    Share,
    Sounds,
    distances,
    frechet,
    kernel_distance,
    picture_classifier,
    picture_rows,
    sound_classifier,
)
from zoo.config import UserError
from zoo.generate import Part, check_causal
from zoo.run import Run
from zoo.sampling import Sampling

TRAINING = 20_000
"""Training documents that are read at most."""
FEWEST = 5
"""A label needs so many training items on average to be fitted."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be generated, and how it is judged."""

    modality: str
    documents: int
    seed: int
    choosing: Mapping[str, Any]
    """Keys of `zoo.choosing.Choosing`."""
    drawing: Sampling
    labels: Path | None = None
    """JSON: a document's key → its label; default: its text is."""
    features: Features | None = None
    """For FID and KID."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was found of n items that were generated from held-out captions."""

    modality: str
    items: int
    training_items: int
    nearest_training: float
    """Mean distance to the nearest training item: root mean square of 8-bit pixels, or of log-mel frames."""
    nearest_training_of_held_out: float
    nearer_than_any_held_out: Share
    """Items that are nearer to a training item than any that was held out: copies, if they are many."""
    labels: int
    """How many different ones; 0 where they are too many to fit a classifier, and nothing is said of them."""
    as_asked: Share | None
    """The classifier sees the label that was asked for."""
    as_asked_shuffled: float | None
    """The same where labels are exchanged: chance."""
    classifier_on_held_out: float | None
    """Accuracy of the classifier on real items that were held out."""
    frechet: float | None
    """Fréchet distance between features of the items and of the held-out ones; FID."""
    kernel: float | None
    """Kernel distance between them; KID."""
    frechet_of_training: float | None
    """The same distance between as many training items and the held-out ones."""

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def generate(
    run: Run, trained_on: Evaluated, data: Evaluated, asked: Asked
) -> tuple[Generation, list[tuple[str, Part]]]:
    """The figures, and (caption, item) of what was generated.

    Args:
        trained_on: the run's training data.
    Raises:
        UserError: the run has no causal mode or no such modality, documents are not described items, or the run's
            training data are not there.
    """
    check_causal(run)
    held_out = described(run, data, asked.modality, asked.documents, asked.seed)
    training = described(run, trained_on, asked.modality, TRAINING, asked.seed)
    choosing: dict[str, Any] = {"seed": asked.seed, **asked.choosing}
    rows = run.generate_all(
        [[text] for _, text, _ in held_out],
        asked.modality,
        drawing=asked.drawing,
        batch=128,
        progress=True,
        **choosing,
    )
    made = [part.item for (part,) in rows]
    real, known = [item for _, _, item in held_out], [item for _, _, item in training]
    see, fit = _seer(run, asked.modality)
    ours, theirs, before = see(made), see(real), see(known)
    near, control = distances(ours, before), distances(theirs, before)
    agreement = _agreement(_labels(held_out, asked.labels), _labels(training, asked.labels), ours, theirs, before, fit)
    found = Generation(
        asked.modality,
        len(made),
        len(known),
        float(near.mean()),
        float(control.mean()),
        Share.of((near < control.min()).astype(float)),
        *agreement,
        *_distributions(asked.features, made, real, known),
    )
    return found, [(text, Part(asked.modality, item)) for (_, text, _), item in zip(held_out, made, strict=True)]


def _seer(run: Run, modality: str) -> tuple[Callable[[Any], np.ndarray], Callable[..., Any]]:
    """What turns items of a modality into rows of numbers, and what fits a classifier to those."""
    config: Any = run.modalities[modality].config
    if config.part == "audio":
        return Sounds(config.rate).rows, sound_classifier
    if config.part == "image":
        return _pictures, picture_classifier
    raise UserError(f"{modality}: items of {config.part!r} have no judge; only images and audio are judged")


def _pictures(pictures: Sequence[np.ndarray]) -> np.ndarray:
    sizes = {np.asarray(picture).shape for picture in pictures}
    if len(sizes) > 1:
        raise UserError(f"pictures of {len(sizes)} sizes have no distance; only those of one size are judged")
    return picture_rows(pictures)


def _labels(described: Sequence[tuple[str, str, Any]], labels: Path | None) -> np.ndarray:
    """(n,) the label of each document."""
    if labels is None:
        return np.array([text for _, text, _ in described])
    try:
        named = json.loads(labels.read_text(encoding="utf-8"))
        return np.array([str(named[key]) for key, _, _ in described])
    except KeyError as error:
        raise UserError(f"--labels {labels}: has no label of document {error}; give one for every key") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--labels {labels}: is no JSON of keys and labels ({error})") from None


def _agreement(
    asked: np.ndarray,
    known: np.ndarray,
    ours: np.ndarray,
    theirs: np.ndarray,
    before: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]],
) -> tuple[int, Share | None, float | None, float | None]:
    """The number of labels, and what a classifier fitted on training items says; nothing where labels are too many."""
    count = len(set(known.tolist()))
    if not 1 < count <= len(known) / FEWEST:
        return 0, None, None, None
    classify = fit(before, known)
    seen = classify(ours)
    shares = [np.mean(asked == label) * np.mean(seen == label) for label in set(seen.tolist())]
    return count, Share.of((seen == asked).astype(float)), float(sum(shares)), float((classify(theirs) == asked).mean())


def _distributions(
    features: Features | None, made: Sequence[Any], real: Sequence[Any], known: Sequence[Any]
) -> tuple[float | None, float | None, float | None]:
    """Fréchet and kernel distance to the held-out items, and the Fréchet distance of training items to them."""
    if features is None:
        return None, None, None
    ours, theirs, others = features(made), features(real), features(known[: len(made)])
    if len(ours) < 2:
        raise UserError("--features: distances of distributions need at least 2 items; raise --documents")
    return frechet(ours, theirs), kernel_distance(ours, theirs), frechet(others, theirs)
