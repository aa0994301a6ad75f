"""Batches for models of any family: prompts with pictures in them, and parts of prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGE, VIDEO, START, END, PAD, WORDS = 63, 62, 61, 60, 0, 60
"""Placeholder ids, what some families put round a picture, padding, and the id below which are words."""
UNSAID = [IMAGE, VIDEO, START, END]
"""Ids that tests let no model generate."""


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image or a video."""

    block: tuple[int, ...]
    """Its ids in a prompt."""
    features: Callable[[torch.Generator], dict[str, Tensor]]
    """What the model is given for it, fp32, made to be joined with others' along dimension 0."""
    frames: tuple[int, ...] = ()
    """Tokens of each frame of a video."""
    frame: Callable[[dict[str, Tensor], int], dict[str, Tensor]] | None = None
    """frame(features, i) → those of frame i, where frames may come one by one."""

    @property
    def groups(self) -> tuple[int, ...]:
        """Tokens of each group under `group: frame`."""
        return self.frames or (sum(token in (IMAGE, VIDEO) for token in self.block),)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """inputs(model, rows, seed=0) → arguments of the model's forward, in its dtype.

    A row is a list of words' counts between pictures: [2, 3] is two words, a picture, three words. Rows are padded on
    the left; what a row holds depends on (seed, its list) alone, whatever the others are.
    """

    pictures: tuple[Picture, ...]
    """A row's i-th picture is pictures[i % len(pictures)]."""
    types: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    """Arguments (B, T) that are made of input_ids."""
    by_row: bool = False
    """Whether features are (B, pictures, …), short rows filled with zeros."""

    def __call__(self, model: nn.Module, rows: Sequence[Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
        lists, features = [], [self.features(counts, seed) for counts in rows]
        for counts in rows:
            draw = torch.Generator().manual_seed(hash((seed, *counts)) % 2**31)
            blocks = [(), *(picture.block for picture in self.of(counts))]
            words = [torch.randint(1, WORDS, (count,), generator=draw).tolist() for count in counts]
            lists.append([token for block, spoken in zip(blocks, words, strict=True) for token in (*block, *spoken)])
        length = max(map(len, lists))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in lists])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in lists])
        return {"input_ids": ids, "attention_mask": mask} | self.types(ids) | self.joined(features, dtype_of(model))

    def joined(self, features: Sequence[Sequence[dict[str, Tensor]]], dtype: torch.dtype) -> dict[str, Tensor]:
        """The features of rows of pictures."""
        names = dict.fromkeys(name for row in features for one in row for name in one)
        result = {}
        for name in names:
            rows = [[one[name] for one in row if name in one] for row in features]
            if self.by_row:
                some, most = next(row[0] for row in rows if row), max(map(len, rows))
                rows = [[torch.cat([*row, *[torch.zeros_like(some)] * (most - len(row))])[None]] for row in rows]
            value = torch.cat([one for row in rows for one in row])
            result[name] = value.to(dtype) if value.is_floating_point() else value
        return result

    def part(
        self, model: nn.Module, counts: Sequence[int], start: int, stop: int, features: Sequence[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The columns [start, stop) of one row, whose pictures are `features`, to come after the ones before it."""
        whole = self(model, [counts])
        ids = whole["input_ids"]
        part = {"input_ids": ids[:, start:stop], "attention_mask": whole["attention_mask"][:, :stop]}
        part |= {name: value[:, :stop] for name, value in self.types(ids).items()}
        part |= {name: value[..., start:stop] for name, value in self.positions(model, whole).items()}
        return part | self.joined([features], dtype_of(model))

    def positions(self, model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """position_ids (3, B, T) of all of a prompt, where a family cannot tell them from a part of it."""
        if not hasattr(model.model, "get_rope_index"):
            return {}
        names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        options = {name: whole.get(name) for name in names}
        return {"position_ids": model.model.get_rope_index(whole["input_ids"], **options)[0]}

    def features(self, counts: Sequence[int], seed: int = 0) -> list[dict[str, Tensor]]:
        """Those of a row's pictures, in order."""
        draw = torch.Generator().manual_seed(hash((seed, *counts)) % 2**31 + 1)
        return [picture.features(draw) for picture in self.of(counts)]

    def of(self, counts: Sequence[int]) -> list[Picture]:
        """A row's pictures, in order."""
        return [self.pictures[i % len(self.pictures)] for i in range(len(counts) - 1)]


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def drawn(**shapes: tuple[int, ...] | list[Any]) -> Callable[[torch.Generator], dict[str, Tensor]]:
    """Features: a shape is normal noise, a list is itself."""

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            name: torch.tensor(shape) if isinstance(shape, list) else torch.randn(*shape, generator=generator)
            for name, shape in shapes.items()
        }

    return draw
