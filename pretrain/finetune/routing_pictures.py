"""Pictures of what Mixture-of-Depths layers of an adapted multimodal LLM keep of an image.

The background is what the model saw, cropped and scaled by its processor. Only families whose image tokens are a square
grid in reading order can be drawn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tqdm
from matplotlib.figure import Figure

import zoo.adapt as za
from pretrain.finetune.prompts import encode
from pretrain.finetune.questions import Question
from zoo.adapt.family import IMAGE, parts, picture_ids
from zoo.config import UserError

SQUARE = ("llava", "vipllava", "paligemma", "gemma3", "internvl", "chameleon")
"""Model types whose image tokens are the patches of one square image, row by row."""
COLUMNS = 4
"""Fields side by side."""
DARK = (0.05, 0.05, 0.15, 0.8)
"""RGBA over skipped patches."""


@dataclasses.dataclass(frozen=True)
class RoutedPicture:
    """One image and what became of its patches."""

    image: np.ndarray
    """(H, W, 3) in [0, 1], as the model saw it."""
    kept: Mapping[int, np.ndarray]
    """By routed layer: (side, side) bool."""
    title: str


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn of some questions."""

    files: list[Path]
    offered: np.ndarray
    """(L,) candidates that each layer was offered; 0 for a dense layer."""
    skipped: np.ndarray
    """(L,) share of them that it skipped; 0 for a dense layer."""


def check_family(model: Any, name: str) -> None:
    """Raise UserError where image tokens of the model's family are not known to be a square grid.

    Args:
        name: of the model, for the message.
    """
    kind = parts(model).top.config.model_type
    if kind not in SQUARE:
        raise UserError(
            f"{name}: image tokens of {kind} are not one square grid for each image, and where a token lies is not "
            f"known here; families that can be drawn: {', '.join(SQUARE)}"
        )


def draw_questions(model: Any, processor: Any, questions: Sequence[Question], title: str, out: Path) -> Drawn:
    """Write into the folder `out` a picture of each image of the questions, and one of what each layer skips.

    Raises:
        UserError: the image tokens of a question are not one square grid for each image.
    """
    out.mkdir(parents=True, exist_ok=True)
    files, loads = [], np.zeros((len(parts(model).layers), 2))  # kept, offered
    for number, question in enumerate(tqdm.tqdm(questions, desc="drawing", unit="sample", disable=None)):
        pictures, load = looked_at(model, processor, question)
        loads += load
        for place, picture in enumerate(pictures):
            files.append(draw(picture, out / f"sample_{number:03d}_image_{place}.png"))
    kept, offered = loads.T
    skipped = np.where(offered > 0, 1 - kept / np.maximum(offered, 1), 0.0)
    return Drawn([*files, draw_ratios(skipped.tolist(), title, out)], offered, skipped)


def looked_at(model: Any, processor: Any, question: Question) -> tuple[list[RoutedPicture], np.ndarray]:
    """One forward pass over a question: its images, and (L, 2) how many candidates each layer kept and was offered.

    Raises:
        UserError: the image tokens are not one square grid for each image.
    """
    found, trace = parts(model), za.Trace()
    inputs = {name: value.to(model.device) for name, value in encode(question, processor, answers=False).items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(found.base.dtype)
    with torch.no_grad():
        model(**inputs, mod_trace=trace)
    ids = [token for token, kind in picture_ids(found.top.config, "").items() if kind == IMAGE]
    pixels, where = inputs["pixel_values"], torch.isin(inputs["input_ids"][0], torch.tensor(ids, device=model.device))
    side = grid_side(int(where.sum()), tuple(pixels.shape), found.top.config.model_type, question.source)
    kept, load = {}, np.zeros((len(found.layers), 2))
    for layer in za.routed_layers(model):
        number, name = layer.routing.layer, layer.routing.name
        if name in trace.decisions:
            kept[number] = trace.decisions[name].kept[0, where].view(-1, side, side).cpu().numpy()
            load[number] = trace.statistics.loads[name].numbers()
    pictures = []
    for place, image in enumerate(seen(pixels, processor)):
        own = {number: grids[place] for number, grids in kept.items()}
        pictures.append(RoutedPicture(image, own, question.turns[-1][0]))
    return pictures, load


def grid_side(tokens: int, pixels: tuple[int, ...], family: str, source: str) -> int:
    """Patches along an edge of each image.

    Args:
        tokens: image tokens of the sample.
        pixels: shape of its pixel values, (images, 3, H, W).
    Raises:
        UserError: there is no such number.
    """
    side = math.isqrt(tokens // pixels[0]) if len(pixels) == 4 else 0
    if side == 0 or side * side * pixels[0] != tokens:
        raise UserError(
            f"{source}: {tokens} image tokens of {family} for pixel values of shape {pixels} are not one square grid "
            "for each image; only such images can be drawn"
        )
    return side


def seen(pixels: Any, processor: Any) -> np.ndarray:
    """Pixel values (n, 3, H, W) → images (n, H, W, 3) in [0, 1], the processor's normalisation and scaling undone."""
    values = pixels.float().cpu().permute(0, 2, 3, 1).numpy()
    settings = processor.image_processor
    if getattr(settings, "do_normalize", False):
        values = values * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
    if getattr(settings, "do_rescale", False):  # by 1/255, if not by Chameleon, of which 0 to 2 is left here
        values = values / (255 * settings.rescale_factor)
    return values.clip(0, 1)


def draw(picture: RoutedPicture, path: Path) -> Path:
    """The image, and for each routed layer the image with its skipped patches darkened."""
    fields = 1 + len(picture.kept)
    columns = min(COLUMNS, fields)
    rows = -(-fields // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows + 0.5), layout="constrained")
    figure.suptitle(picture.title[:80], fontsize=9, parse_math=False)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    height, width = picture.image.shape[:2]
    for axis in axes:
        axis.set_axis_off()
    axes[0].set_title("image", fontsize=8)
    axes[0].imshow(picture.image)
    for axis, (layer, kept) in zip(axes[1:], sorted(picture.kept.items()), strict=False):
        axis.set_title(f"layer {layer}: {kept.sum()} of {kept.size} kept", fontsize=8)
        axis.imshow(picture.image, extent=(0, width, height, 0))
        shade = np.zeros((*kept.shape, 4))
        shade[~kept] = DARK
        axis.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
    figure.savefig(path, dpi=110)
    return path


def draw_ratios(ratios: Sequence[float], title: str, folder: Path) -> Path:
    """Bars: the share of candidates that each layer skips; dense layers skip none."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(max(5.0, 0.3 * len(ratios) + 2), 3.2), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(ratios)), ratios)
    axes.set(xlabel="layer", ylabel="share of image tokens skipped", ylim=(0, 1), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    path = folder / "skip_ratio.png"
    figure.savefig(path, dpi=120)
    return path
