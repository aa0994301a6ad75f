"""Loss, perplexity and bits a byte of a run by modality, causal and top-k, on rows of any data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain import report
from pretrain.data import micro_batches
from pretrain.data.mixture import Mixture
from pretrain.evaluate import count_batches, evaluate, routings
from pretrain.recipe import Recipe
from tools.evaluate.data import Evaluated
from zoo.carries import Channels, Vectors
from zoo.objectives.autoregressive import LENGTH
from zoo.objectives.denoising import Denoising
from zoo.run import Run

SAMPLE_BYTES = 2
"""Bytes of a sample of sound, as a WAV file of 16 bits has it."""


@dataclasses.dataclass(frozen=True)
class Losses:
    """What was found on some rows."""

    rows: int
    rows_of: int
    """Rows of an epoch of the data."""
    values: Mapping[str, float]
    """As `pretrain.evaluate.evaluate` names them, and of each modality whose losses are cross-entropies
    `eval/<routing>/perplexity/<modality>` and `…/bits_per_byte/<modality>`; `eval/gap`, `eval/gap/<modality>`: causal
    loss less top-k loss; `eval/unigram/<modality>` and `eval/constant/<modality>`: the loss of the best constant
    guess."""
    step: int | None = None
    """The step of the run's own last evaluation; on its own data alone."""
    difference: float | None = None
    """The largest difference to what the run itself said there, over losses."""

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def losses(run: Run, recipe: Recipe, data: Evaluated, rows: int | None) -> Losses:
    """Evaluate as the training does: the same rows, in the same batches, under the same routing.

    Args:
        rows: how many, from the first on; None: as many as the recipe says.
    """
    opened = data.open(run, recipe.seed)
    stream = data.stream(opened)
    wanted = min(rows or recipe.evaluate.rows, stream.rows_per_epoch)
    values = evaluate(
        run.model,
        run.model,
        run.objective,
        stream,
        wanted,
        recipe.train.micro_batch,
        device=run.model.norm.weight.device,
        bits_per_byte=True,
    )
    values |= {f"eval/unigram/{name}": nats for name, nats in opened.unigram_entropy(data.split).items()}
    errors = opened.constant_error(data.split).items()
    values |= {f"eval/constant/{name}": run.objective.constant_loss(name, error) for name, error in errors}
    found = Losses(wanted, stream.rows_per_epoch, values | _derived(run, recipe, stream, wanted, values))
    own = report.last_evaluation(run.folder) if data.own and data.split == "validation" else {}
    shared = [key for key in own if "/loss" in key and key in values]
    if not shared or wanted != min(recipe.evaluate.rows, stream.rows_per_epoch):
        return found
    difference = max(abs(own[key] - values[key]) for key in shared)
    return dataclasses.replace(found, step=int(own["step"]), difference=difference)


def _derived(run: Run, recipe: Recipe, stream: Mixture, rows: int, values: Mapping[str, float]) -> dict[str, float]:
    """Perplexities, bits a byte and the gap."""
    size = recipe.train.micro_batch
    batches = micro_batches(stream, range(-(-rows // size) * size), size, end=rows)
    counts = count_batches(run.objective, run.model.modalities, batches).by_part(run.objective)
    sizes = plain_bytes(run, stream, rows)
    found = {}
    for routing in routings(run.model):
        for name in filter(lambda name: said_in_nats(run, name), run.modalities):
            key = f"eval/{routing}/loss/{name}"
            if key not in values:
                continue
            found[f"eval/{routing}/perplexity/{name}"] = math.exp(min(values[key], 700))
            carries = run.modalities[name].config.carries
            nats = values[key] * counts[name] * (carries.count if isinstance(carries, Channels) else 1)
            nats += values.get(key + LENGTH, 0.0) * counts.get(name + LENGTH, 0)
            if sizes.get(name):
                found[f"eval/{routing}/bits_per_byte/{name}"] = nats / math.log(2) / sizes[name]
    for key in [key for key in values if key.startswith("eval/causal/loss") and "@" not in key]:
        topk = key.replace("causal", "topk", 1)
        if topk in values:
            found[key.replace("causal/loss", "gap", 1)] = values[key] - values[topk]
    return found


def said_in_nats(run: Run, name: str) -> bool:
    """Whether the loss of a modality is a cross-entropy."""
    config = run.modalities[name].config
    denoised = isinstance(run.objective, Denoising) and config.bidirectional
    return not isinstance(config.carries, Vectors) and not denoised


def plain_bytes(run: Run, stream: Mixture, rows: int) -> dict[str, float]:
    """Bytes of what some rows hold of each modality, written plainly: UTF-8 of texts, 8 bits a value of pictures, 16
    bits a sample of sounds, as the modality decodes them; without those of a kind that decodes to anything else."""
    sizes: dict[tuple[str, int], float | None] = {}  # of an item, by its positions
    found = {run.vocabulary.text: stream.text_bytes(range(rows))}
    for number, (name, modality) in enumerate(run.modalities.items()):
        if name == run.vocabulary.text or not said_in_nats(run, name):
            continue
        first = run.vocabulary.range(name)[0]
        for row in map(stream.row, range(rows)):
            own = row.modality == number
            content = row.content[name] if name in row.content else row.tokens[own] - first
            edges = np.flatnonzero(np.diff(np.flatnonzero(own)) > 1) + 1  # markers stand between items
            for item in np.split(content, edges) if len(content) else []:
                if (name, len(item)) not in sizes:
                    sizes[name, len(item)] = _plain_size(modality.decode(item))
                found[name] = found.get(name, 0.0) + (sizes[name, len(item)] or 0.0)
    return found


def _plain_size(item: Any) -> float | None:
    if not isinstance(item, np.ndarray):
        return None
    return float(item.nbytes if item.dtype == np.uint8 else item.size * SAMPLE_BYTES)
