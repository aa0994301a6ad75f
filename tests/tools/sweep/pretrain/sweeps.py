"""Sweeps over tiny pretrainings, and run folders without a run, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pretrain import recipe as recipes
from pretrain.document_losses import DocumentLosses, path_of
from tests.pretrain.runs import EXPERTS, LAYER, tiny_recipe, write_recipe

MOMA = {"model": {"layers": {"feedforward": EXPERTS | {"d_ff": 32}}}}


def config(folder: Path, data: Path | str, **changes: Any) -> dict[str, Any]:
    """A dense arm and a MoMa arm of equal FLOPs, one seed, four steps; `recipe.yaml` of `folder` is their recipe."""
    layer = {**LAYER, "feedforward": {"type": "dense", "d_ff": 32}}
    train = {"steps": 4, "evaluate_every": 2, "checkpoint_every": 2, "log_every": 1, "device": "cpu"}
    write_recipe(
        folder,
        data,
        folder / "unused",
        model={"layers": [layer]},
        train=train,
        deepspeed={"zero_optimization": {"stage": 0}},
    )
    return {
        "type": "pretrain",
        "recipe": "recipe.yaml",
        "match": {"flops": 0.01},
        "seeds": [0],
        "arms": {"dense": {}, "moma": {"over": MOMA}},
    } | changes


def write_sweep(folder: Path, data: Path | str, **changes: Any) -> Path:
    """The same as a file."""
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(config(folder, data, **changes), sort_keys=False))
    return path


def write_run(
    folder: Path,
    name: str,
    seed: int,
    scale: float,
    routers: bool = False,
    tokens: int = 1000,
    points: int = 5,
    documents: int = 0,
) -> Path:
    """A run folder with a recipe and a curve: losses are `scale` times those of a power law, tokens `tokens` a step.

    Args:
        documents: how many have their losses kept, each with ten terms of both modalities; a document's losses are the
            farther from the mean the higher its number, by the same factor in all runs.
    """
    folder.mkdir(parents=True)
    recipe = recipes.resolve(tiny_recipe("data", folder, name=name, seed=seed))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.dump(), sort_keys=False))
    lines = []
    for step in range(1, points + 1):
        used = {"tokens": tokens * step, "flops": 1e6 * step, "seconds": 2.0 * step}
        lines.append({"step": step, **used, "loss": 1.0, "tokens_per_second": 500.0 + step, "memory": 2**28})
        loss = scale * (1 + 0.01 * seed) * step**-0.5
        if documents:
            factor = np.linspace(0.5, 1.5, documents)[:, None]
            sums, counts = 10 * factor * [loss, 2 * loss, 0], np.full((documents, 3), 10)
            kept = DocumentLosses(("text", "image", "z_loss"), np.arange(documents), sums, counts)
            kept.save(path_of(folder, step))
        values = {"eval/causal/loss": loss, "eval/causal/loss/text": loss, "eval/causal/loss/image": 2 * loss}
        if routers:
            values |= {"eval/topk/loss": 0.9 * loss, "eval/auxiliary/accuracy": 0.9, "eval/auxiliary/always_skip": 0.7}
            for layer in range(2):
                block = f"eval/causal/router/layers.{layer}.feedforward.groups.all"
                values |= {f"{block}/entropy": 0.8, f"{block}/specialisation": 0.25, f"{block}/load/text": 1.5}
        lines.append({"step": step, **used, **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
