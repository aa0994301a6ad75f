"""What a model trained on captioned drawings can do: draw from captions it never saw, and find a drawing's caption.

No figure can be had by copying: the distance to the nearest training drawing stands beside that of real drawings that
were held out, and the classifier is asked about captions, not about beauty.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from pretrain.data.shards import find_shards
from tools.evaluate.judging import (
    RESAMPLES,
    Share,
    distances,
    picture_classifier,
    picture_rows,
    squared_distances,
)
from tools.examples.captions import draw, scores
from zoo.config import UserError
from zoo.run import Run
from zoo.sampling import Sampling

CANDIDATES = 20
"""Captions among which the right one is to be found."""
NEAR = 8.0
"""Drawings that differ by less, in the root mean square of their 8-bit pixels, are copies."""
TEMPERATURE = 0.9
"""At which pictures of ids are chosen."""


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Drawings with a caption and a category each."""

    images: np.ndarray
    """(n, H, W, channels) uint8, as the model sees them."""
    captions: list[str]
    categories: np.ndarray
    """(n,) name of the category of each."""

    def pick(self, index: np.ndarray) -> Captioned:
        """Some of them."""
        return Captioned(self.images[index], [self.captions[i] for i in index], self.categories[index])


def read_captioned(folder: str, pattern: str, run: Run) -> Captioned:
    """The documents of shards that have one picture, one text and a `category`.

    Raises:
        UserError: there are none.
    """
    images, captions, categories = [], [], []
    config: Any = run.modalities["image"].config
    for shard in find_shards(Path(folder), pattern, "data"):
        for item in webdataset.WebDataset(str(shard), shardshuffle=False):
            document = json.loads(item["json"])
            parts = {part["type"]: part for part in document["parts"]}
            if set(parts) == {"text", "image"} and len(document["parts"]) == 2 and "category" in document:
                images.append(config.read(item[parts["image"]["file"]]))
                captions.append(parts["text"]["text"])
                categories.append(document["category"])
    if not images:
        raise UserError(f"{folder}: no document of {pattern} has one picture, one text and a category")
    return Captioned(np.stack(images), captions, np.array(categories))


def evaluate(
    run: Run,
    training: Captioned,
    held_out: Captioned,
    sampling: Sampling,
    seed: int,
) -> tuple[dict[str, Any], np.ndarray]:
    """The figures, and the drawings (n, H, W, channels) uint8 that they are about, one for each held-out caption."""
    drawn = draw(run, held_out.captions, sampling, TEMPERATURE, seed)
    classify = classifier(training)
    seen, asked = classify(drawn), held_out.categories
    hits = (seen == asked).astype(float)
    random = np.random.default_rng(seed)
    shuffled = np.array([(seen == random.permutation(asked)).mean() for _ in range(RESAMPLES)])
    known = picture_rows(training.images)
    near, control = (distances(picture_rows(images), known) for images in (drawn, held_out.images))
    summary: dict[str, Any] = {
        "drawings": len(drawn),
        "category_as_asked": dataclasses.asdict(Share.of(hits)),
        "category_for_shuffled_captions": {
            "value": float(shuffled.mean()),
            "low": float(np.quantile(shuffled, 0.025)),
            "high": float(np.quantile(shuffled, 0.975)),
        },
        "shuffled_as_good_as_asked": float((shuffled >= hits.mean()).mean()),
        "classifier_accuracy_on_held_out": float((classify(held_out.images) == asked).mean()),
        "nearest_training_distance": float(near.mean()),
        "nearest_training_distance_of_held_out": float(control.mean()),
        "copies": float((near < NEAR).mean()),
        "copies_among_held_out": float((control < NEAR).mean()),
    }
    return summary | retrieval(run, held_out, random), drawn


def classifier(training: Captioned) -> Callable[[np.ndarray], np.ndarray]:
    """A function from drawings (n, H, W, channels) to the names of their categories."""
    fitted = picture_classifier(picture_rows(training.images), training.categories)
    return lambda images: fitted(picture_rows(images))


def nearest(images: np.ndarray, training: np.ndarray) -> np.ndarray:
    """(n,) number of the nearest training drawing of each image."""
    return squared_distances(picture_rows(images), picture_rows(training)).argmin(1)


def retrieval(run: Run, held_out: Captioned, random: np.random.Generator) -> dict[str, Any]:
    """How often the right caption among `CANDIDATES` is the one that a drawing makes likelier than it is by itself."""
    found = []
    blank = unconditional(run, held_out.captions)
    for number in range(len(held_out.captions)):
        others = random.permutation([n for n in range(len(held_out.captions)) if n != number])[: CANDIDATES - 1]
        choice = np.append(others, number)
        said = scores(run, held_out.images[[number]], [held_out.captions[n] for n in choice])[0]
        found.append((said - blank[choice]).argmax() == len(choice) - 1)
    return {"caption_found": dataclasses.asdict(Share.of(np.array(found, float))), "candidates": CANDIDATES}


def unconditional(run: Run, captions: Sequence[str]) -> np.ndarray:
    """(n,) log-likelihood in nats of each caption, and of the end of the document, with no picture before it."""
    return scores(run, [None], captions)[0]
