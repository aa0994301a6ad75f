"""What a model trained on the digits has learned, by causal evaluation on digits it never saw.

    python -m tools.examples.evaluate_digits RECIPE [key.sub=value ...]

Reads the run's weights, asks it to name the held-out digits and to draw each digit from its name, lets a classifier
fitted on real training digits judge the drawings, looks for copies of training images, prints one table and writes
`summary.json`, `samples.png` and `loss.png` into the run's `report/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC

from pretrain import recipe as recipes
from pretrain import report, run_folder
from pretrain.data import Data, open_data
from pretrain.upcycle import check_ids
from tools.examples.make_digits import NAMES, SHIFTS, load_digits_split, shift
from zoo.config import UserError
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

    asked: np.ndarray
    """(n,) the digit that was asked for."""
    codes: np.ndarray
    """(n, 16) image codes."""
    images: np.ndarray
    """(n, 8, 8) uint8."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.examples.evaluate_digits", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="the recipe the run was started with")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args(arguments)
    try:
        recipe = recipes.load(options.recipe, options.overrides)
        model, recipe = run_folder.load_model(recipe.folder)
        data = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda text: None)
        check_ids(recipe.folder, recipe, run_folder.position(recipe.folder), data)
        summary, drawings = evaluate(model, data, recipe.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = recipe.folder
    summary |= run_figures(run)
    report.write_summary(run, summary)
    report.draw_losses(run)
    rows = {name: list(drawings.images[drawings.asked == digit]) for digit, name in enumerate(NAMES)}
    report.draw_images(
        rows, report.folder_of(run) / "samples.png", f"{run.name}: drawn from captions, T = {TEMPERATURE}"
    )
    report.print_table(f"{run.name}: {sum(p.numel() for p in model.parameters()):,} parameters", table(summary))
    print(f"pictures and summary.json are in {report.folder_of(run)}")
    return 0


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
    asked, codes = [], []
    for digit, name in enumerate(NAMES):
        caption = text.tokens(data.modalities["text"].encode(name))
        prompt = torch.tensor([[data.vocabulary.bos, *caption.tolist(), image.begin]]).expand(SAMPLES, -1).contiguous()
        new = generate(model, prompt, torch.zeros_like(prompt), image.choices(), temperature, generator)
        asked += [digit] * SAMPLES
        codes.append((new - image.choice.start).numpy())
    together = np.concatenate(codes)
    return Drawings(np.array(asked), together, np.stack([_decode(data, c) for c in together]))


def run_figures(run: Path) -> dict[str, Any]:
    """What the training itself reported last."""
    values, step = report.last_evaluation(run), report.last_step(run)
    loss = {
        modality: {
            routing: values[f"eval/{routing}/loss/{modality}"]
            for routing in ("causal", "topk")
            if f"eval/{routing}/loss/{modality}" in values
        }
        for modality in ("text", "image")
    }
    figures: dict[str, Any] = {
        "loss": loss,
        "tokens": step["tokens"],
        "seconds": step["seconds"],
        "training_flops": step["flops"],
    }
    if "eval/auxiliary/accuracy" in values:
        figures["router_accuracy"] = values["eval/auxiliary/accuracy"]
        figures["router_always_skip"] = values["eval/auxiliary/always_skip"]
        figures["flops_per_token"] = {
            "causal": values["eval/causal/flops_per_token"],
            "nominal": values["eval/nominal_flops_per_token"],
        }
    return figures


def table(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The summary in words."""
    rows = [
        ("image → caption, held-out digits", f"{summary['image_to_caption_accuracy']:.1%} right"),
        (f"caption → image, T = {TEMPERATURE}", f"{summary['caption_to_image_agreement']:.1%} recognised as asked"),
        ("caption → image, T = 1.0", f"{summary['caption_to_image_agreement_at_temperature_1']:.1%}"),
        (
            "the classifier on real held-out digits",
            f"{summary['classifier_accuracy_on_held_out']:.1%}, through the codebook "
            f"{summary['classifier_accuracy_on_held_out_as_tokens']:.1%}",
        ),
        ("distinct drawings", f"{summary['distinct_share']:.1%}"),
        (
            "exact copies of training images",
            f"{summary['training_copies']:.1%} (held-out digits {summary['held_out_copies']:.1%})",
        ),
        (
            "distance to the nearest training digit",
            f"{summary['nearest_training_distance']:.1f} (held-out digits "
            f"{summary['nearest_training_distance_of_held_out']:.1f})",
        ),
    ]
    for modality, loss in summary["loss"].items():
        text = f"{loss['causal']:.3f} causal" + (f", {loss['topk']:.3f} top-k" if "topk" in loss else "")
        rows.append((f"validation loss, {modality}", text + " nats"))
    if "router_accuracy" in summary:
        always = summary["router_always_skip"]
        rows.append(("auxiliary routers", f"{summary['router_accuracy']:.1%} accurate (always skipping: {always:.1%})"))
        used = summary["flops_per_token"]
        rows.append(("FLOPs a token", f"{used['causal']:,.0f} in causal routing, {used['nominal']:,.0f} nominal"))
    rows.append(("training", f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s"))
    return rows


def _decode(data: Data, codes: np.ndarray) -> np.ndarray:
    return data.modalities["image"].decode(codes)[..., 0]


def _flat(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1) / 255.0


def _agreement(judge: SVC, drawings: Drawings) -> float:
    return float((judge.predict(_flat(drawings.images)) == drawings.asked).mean())


def _nearest(images: np.ndarray, training: np.ndarray) -> float:
    """Mean Euclidean distance to the nearest training image, in the data's own units (0..16 a pixel)."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) * (16 / 255) for x in (images, training))
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return float(np.sqrt(np.maximum(squared, 0).min(1)).mean())


if __name__ == "__main__":
    sys.exit(main())
