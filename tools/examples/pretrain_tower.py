"""Pretrain the vision tower of an untrained LLaVA folder on what its patches show, as LLaVA's own tower comes
pretrained.

    python -m tools.examples.pretrain_tower FOLDER DATA [--steps 700] [--batch 8] [--lr 2e-3]

FOLDER is one of `tools.examples.make_llava`, DATA one of `tools.examples.make_digit_grids`. Linear heads read from each
patch's output which digit the patch is of, if any, and the row and column of its cell; the heads are thrown away, the
tower is written back into FOLDER. Learnt through a decoder alone, from some answers an image, the same takes many times
as long.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tqdm
from torch import Tensor, nn

from pretrain.finetune.questions import Question, read_questions
from zoo.config import UserError
from zoo.modalities.pictures import open_picture

PLACE_WEIGHT = 0.3
"""Weight of the loss of row and column: the position code does most of it, and must not be forgotten."""
WARMUP, CLIP, WEIGHT_DECAY, BETAS = 30, 1.0, 0.05, (0.9, 0.98)


class PatchHeads(nn.Module):
    """What a patch shows: `digit` (0 blank, else digit + 1), `row` and `column` of its cell."""

    def __init__(self, width: int, digits: int, rows: int, columns: int) -> None:
        super().__init__()
        sizes = {"digit": digits + 1, "row": rows, "column": columns}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})

    def forward(self, patches: Tensor) -> dict[str, Tensor]:
        """Logits (B, T, classes) of each head for the patches' features (B, T, D)."""
        return {name: head(patches) for name, head in self.heads.items()}


def targets(cells: np.ndarray, side: int) -> dict[str, Tensor]:
    """What each patch is to be read as, each (B, side·side).

    Args:
        cells: digits, -1 where blank, (B, R, C).
        side: patches along a side of an image; a multiple of R and C.
    """
    batch, rows, columns = cells.shape
    row = np.repeat(np.arange(rows), side // rows)[:, None].repeat(side, 1)
    column = np.repeat(np.arange(columns), side // columns)[None].repeat(side, 0)
    digit = cells.repeat(side // rows, 1).repeat(side // columns, 2) + 1
    values = {"digit": digit, "row": row, "column": column}
    return {
        name: torch.tensor(np.broadcast_to(v, (batch, side, side)).reshape(batch, -1)) for name, v in values.items()
    }


def pretrain(
    model: Any, processor: Any, data: Path, steps: int = 700, batch: int = 8, lr: float = 2e-3, seed: int = 0
) -> float:
    """Train `model`'s vision tower in place, with AdamW, a constant learning rate and a linear fall over the second
    half.

    Args:
        model, processor: of Transformers' LLaVA with a CLIP tower.
        data: folder of `tools.examples.make_digit_grids`.
        batch: pictures a step.
    Returns:
        share of the patches of validation digits that are read rightly.
    Raises:
        UserError: lines without cells, or a grid that cuts patches.
    """
    tower, side = model.model.vision_tower, processor.image_processor.crop_size["height"] // processor.patch_size
    pictures, validation = (read_pictures(read_questions(data, split), side) for split in ("train", "validation"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = PatchHeads(tower.config.hidden_size, 10, *pictures[0][1].shape)
        order = torch.cat([torch.randperm(len(pictures)) for _ in range(-(-steps * batch // len(pictures)))])
    weights = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=BETAS, weight_decay=WEIGHT_DECAY)
    tower.train()
    with tqdm.trange(steps, desc="tower", disable=None) as bar:
        for step in bar:
            optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / WARMUP, 2 * (steps - step) / steps)
            chosen = [pictures[i] for i in order[step * batch : (step + 1) * batch]]
            logits, wanted = read(tower, heads, processor, chosen, side)
            losses = {name: F.cross_entropy(logits[name].flatten(0, 1), wanted[name].flatten()) for name in logits}
            loss = losses["digit"] + PLACE_WEIGHT * (losses["row"] + losses["column"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tower.eval()
    return accuracy(tower, heads, processor, validation, side)


def read_pictures(questions: list[Question], side: int) -> list[tuple[Any, np.ndarray]]:
    """Each picture once, with its cells (R, C).

    Raises:
        UserError: as `pretrain`.
    """
    found: dict[Any, np.ndarray] = {}
    for question in questions:
        if "cells" not in question.extra:
            raise UserError(f"{question.source}: has no 'cells'; give a folder of tools.examples.make_digit_grids")
        cells = np.array(question.extra["cells"])
        rows, columns = cells.shape[-2:]
        if side % rows or side % columns:
            raise UserError(
                f"{question.source}: {rows} rows and {columns} columns do not divide the {side} patches along an image;"
                " make grids or images of other sizes"
            )
        found |= dict(zip(question.images, cells.reshape(-1, rows, columns), strict=True))
    return list(found.items())


def read(
    tower: nn.Module, heads: PatchHeads, processor: Any, pictures: list[tuple[Any, np.ndarray]], side: int
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Logits (B, T, classes) and targets (B, T) of the heads for B pictures of T patches."""
    images = [open_picture(file).convert("RGB") for file, _ in pictures]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    patches = tower(pixel_values=pixels).last_hidden_state[:, 1:]  # without the class token
    return heads(patches), targets(np.stack([cells for _, cells in pictures]), side)


@torch.no_grad()
def accuracy(
    tower: nn.Module, heads: PatchHeads, processor: Any, pictures: list[tuple[Any, np.ndarray]], side: int
) -> float:
    """Share of the patches of digits whose digit is read rightly."""
    right = total = 0
    for start in range(0, len(pictures), 32):
        logits, wanted = read(tower, heads, processor, pictures[start : start + 32], side)
        shown = wanted["digit"] > 0
        right += int((logits["digit"].argmax(-1) == wanted["digit"])[shown].sum())
        total += int(shown.sum())
    return right / total


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of tools.examples.make_llava; its tower is replaced")
    parser.add_argument("data", type=Path, help="folder of tools.examples.make_digit_grids")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=8, help="pictures a step (default: 8)")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    try:
        if not (options.folder / "config.json").is_file():
            raise UserError(f"{options.folder}: holds no model; make one with tools.examples.make_llava")
        kind = json.loads((options.folder / "config.json").read_text()).get("model_type")
        if kind != "llava":
            raise UserError(f"{options.folder}: holds a model of type {kind!r}, not 'llava'")
        model = LlavaForConditionalGeneration.from_pretrained(options.folder)
        processor = AutoProcessor.from_pretrained(options.folder, trust_remote_code=False)
        settings = {name: getattr(options, name) for name in ("steps", "batch", "lr", "seed")}
        right = pretrain(model, processor, options.data, **settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    model.save_pretrained(options.folder)
    print(f"{options.folder}: the tower reads {right:.1%} of the patches of validation digits rightly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
