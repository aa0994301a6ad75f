"""What a model trained on the digits can do: name held-out digits, and draw digits that a classifier recognises."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from pretrain.data import Data
from tools.examples.make_digits import NAMES, SHIFTS, load_digits_split, shift
from zoo.context import CAUSAL, TokenContext
from zoo.generate import generate, log_likelihood
from zoo.model import Model

SAMPLES = 20
"""Drawings of each digit."""
TEMPERATURE = 0.8
BATCH = 512


@dataclasses.dataclass(frozen=True)
class Drawings:
    """`SAMPLES` drawings of each digit."""

    digits: np.ndarray
    """(n,) the digit that was asked for."""
    codes: np.ndarray
    """(n, 16) image codes."""
    images: np.ndarray
    """(n, 8, 8) uint8."""


def evaluate(model: Model, data: Data, seed: int) -> tuple[dict[str, Any], Drawings]:
    """The summary's figures about reading and drawing, and the drawings they are about."""
    train_images, train_labels, images, labels = load_digits_split()
    judge = SVC().fit(train_images.reshape(len(train_images), -1) / 255.0, train_labels)
    shifted = np.concatenate([train_images] + [np.stack([shift(i, *by) for i in train_images]) for by in SHIFTS])
    known_codes = {tuple(data.modalities["image"].encode(image)) for image in shifted}
    reconstructed = np.stack([_decode(data, data.modalities["image"].encode(image)) for image in images])
    drawings = draw(model, data, TEMPERATURE, seed)
    warmer = draw(model, data, 1.0, seed)
    summary = {
        "image_to_caption_accuracy": float((read(model, data, images) == labels).mean()),
        "caption_to_image_agreement": _agreement(judge, drawings),
        "caption_to_image_agreement_at_temperature_1": _agreement(judge, warmer),
        "classifier_accuracy_on_held_out": float((judge.predict(_flat(images)) == labels).mean()),
        "classifier_accuracy_on_held_out_as_tokens": float((judge.predict(_flat(reconstructed)) == labels).mean()),
        "distinct_share": len({tuple(codes) for codes in drawings.codes}) / len(drawings.codes),
        "training_copies": float(np.mean([tuple(codes) in known_codes for codes in drawings.codes])),
        "held_out_copies": float(
            np.mean([tuple(data.modalities["image"].encode(image)) in known_codes for image in images])
        ),
        "nearest_training_distance": _nearest(drawings.images, train_images),
        "nearest_training_distance_of_held_out": _nearest(reconstructed, train_images),
    }
    return summary, drawings


def read(model: Model, data: Data, images: np.ndarray) -> np.ndarray:
    """The likeliest of the ten captions after each image (n, 8, 8): (n,) digits."""
    words, grammar = data.vocabulary, data.grammars
    image_tokens, text = data.modalities["image"], data.modalities["text"]
    captions = [[*grammar["text"].tokens(text.encode(name)), words.eos] for name in NAMES]
    longest = max(len(caption) for caption in captions)
    sequences, scored = [], []
    for image in images:
        prompt = [words.bos, *grammar["image"].tokens(image_tokens.encode(image))]
        for caption in captions:
            padding = longest - len(caption)
            sequences.append([*prompt, *caption] + [-1] * padding)
            scored.append([False] * len(prompt) + [True] * len(caption) + [False] * padding)
    tokens, mask = np.array(sequences), torch.tensor(scored)
    modality = torch.from_numpy(np.where(tokens < 0, -1, words.modality_of(np.maximum(tokens, 0))))
    ids = torch.from_numpy(np.maximum(tokens, 0))
    scores = []
    for chunk in range(0, len(ids), BATCH):
        part = slice(chunk, chunk + BATCH)
        context = TokenContext.from_modality(modality[part], modalities=words.modalities, routing=CAUSAL)
        scores.append(log_likelihood(model, ids[part], context, mask[part]))
    return torch.cat(scores).view(len(images), len(captions)).argmax(1).numpy()


def draw(model: Model, data: Data, temperature: float, seed: int) -> Drawings:
    """`SAMPLES` images for each caption."""
    text, image = data.grammars["text"], data.grammars["image"]
    generator = torch.Generator().manual_seed(seed)
    digits, codes = [], []
    for digit, name in enumerate(NAMES):
        caption = text.tokens(data.modalities["text"].encode(name))
        prompt = torch.tensor([[data.vocabulary.bos, *caption.tolist(), image.begin]]).expand(SAMPLES, -1).contiguous()
        new = generate(model, prompt, torch.zeros_like(prompt), image.choices(), temperature, generator)
        digits += [digit] * SAMPLES
        codes.append((new - image.choice.start).numpy())
    together = np.concatenate(codes)
    return Drawings(np.array(digits), together, np.stack([_decode(data, c) for c in together]))


def _decode(data: Data, codes: np.ndarray) -> np.ndarray:
    return data.modalities["image"].decode(codes)[..., 0]


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _agreement(judge: SVC, drawings: Drawings) -> float:
    return float((judge.predict(_flat(drawings.images)) == drawings.digits).mean())


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest training image, in the data's own units (0..16 a pixel)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) * (16 / 255) for x in (images, training))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.sqrt(np.maximum(squared, 0).min(1)).mean())
