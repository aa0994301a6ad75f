"""A tiny multimodal model with its processor, questions about tiny pictures, and a recipe that tunes the one on the
other."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.pretrain.finetune.processors import END, llava_processor
from tests.zoo.adapt.families import llava

ADAPT = {
    "layers": [1, 2],
    "capacity": {"type": "constant", "value": 0.5},
    "gate": {"activation": "softmax"},
    "auxiliary": {"type": "membership", "weight": 0.1},
}


def write_base(folder: Path, **text: Any) -> Path:
    """A LLaVA of four layers with random weights, always the same; 16 tokens an image of 8 × 8 pixels."""
    torch.manual_seed(0)
    llava(**({"eos_token_id": END, "initializer_range": 0.1} | text)).float().save_pretrained(folder)
    llava_processor().save_pretrained(folder)
    return folder


def write_data(folder: Path, train: int = 22, validation: int = 6, texts: int = 0) -> Path:
    """Pictures of one grey and the question which; with `texts` every so many-th line is a question without a
    picture."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("validation", validation)):
        lines = []
        for number in range(count):
            draw = np.random.RandomState(1000 * len(split) + number)
            bright = bool(draw.randint(2))
            if texts and number % texts == 0:
                lines.append({"question": f"say {number % 10}", "answer": str(number % 10), "kind": "text"})
                continue
            name = f"{split}{number}.png"
            grey = draw.randint(0, 60, (8, 8)) + 190 * bright
            Image.fromarray(grey.astype(np.uint8)).save(folder / name)
            answer = "white" if bright else "dark"
            lines.append({"image": name, "question": "what is it?", "answer": answer, "kind": "grey"})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def tuning_recipe(base: Path | str, data: Path | str, run: Path | str, /, **changes: Any) -> dict[str, Any]:
    """γ-MoD on two of four layers, ZeRO-2, 6 steps of 4 samples at a constant learning rate.

    Args:
        changes: sections laid over these, one level deep.
    """
    recipe: dict[str, Any] = {
        "name": "tuning",
        "run_dir": str(run),
        "base": str(base),
        "adapt": ADAPT,
        "data": {"path": str(data)},
        "optimizer": {"lr": 3e-3},
        "schedule": {"type": "wsd", "decay_steps": 1},
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "device": "cpu", "log_every": 1},
        "evaluate": {"samples": 5},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    for section, values in changes.items():
        both = isinstance(values, Mapping) and isinstance(recipe.get(section), Mapping)
        recipe[section] = {**recipe[section], **values} if both else values
    return recipe


def write_tuning(folder: Path, base: Path, data: Path, run: Path, /, **changes: Any) -> Path:
    """`tuning_recipe` as a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(tuning_recipe(base, data, run, **changes), sort_keys=False))
    return path
