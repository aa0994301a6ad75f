"""Prefill and decode of each arm's model beside the dense one, in turn, in one process that runs alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tqdm

import zoo.adapt as za
from pretrain.finetune import model as models
from pretrain.finetune.batcher import moved
from pretrain.finetune.prompt_batches import Prompts
from pretrain.finetune.questions import read_questions
from pretrain.finetune.recipe import FinetuneRecipe
from pretrain.process_group import choose_device
from tools.bench.adapted import prefilling, step
from tools.bench.measure import Sample, read
from tools.bench.measure import measure as take_turns
from tools.sweep.adapt.plan import AdaptPoint
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.folder import write_json

DENSE, SPARSE, TOWER = "dense", "sparse", "tower"
SECONDS = 60.0
"""No more rounds, but for three, once a comparison has taken so long."""


def measure(config: SweepConfig, recipe: Mapping[str, Any], points: Sequence[AdaptPoint], path: Path) -> dict[str, Any]:
    """Time each arm and target, of the first seed, that `path` does not yet hold.

    Routers have their first weights: under top-k the work does not depend on them. One test prompt is repeated
    `timing.batch` times, so that no row is padded.

    Returns:
        `<arm>-<target>` → `prefill`, `decode`, each with `ms`, `dense_ms`, `ratio`, `spread` (smallest and largest
        ratio of a round), `rounds`, `busy` (other processes disturbed too many rounds); and `prefill.tower_ms`, the
        part of both prefills that is the vision tower and projector.
    """
    times = json.loads(path.read_text()) if path.exists() else {}
    wanted = {f"{p.arm}-{p.setting}": p for p in points if p.seed == config.seeds[0] and p.adapt is not None}
    missing = {
        name: point
        for name, point in wanted.items()
        if name not in times or times[name]["settings"] != _settings(config, point)
    }
    if not missing:
        return times
    parsed = FinetuneRecipe.parse(recipe)
    base = models.open_base(parsed)
    device = choose_device(parsed.train.device)
    dense: Any = models.first_model(parsed, base).to(device).eval()
    question = next(q for q in read_questions(Path(config.data), config.test.split) if q.images)
    prompts = Prompts.encode([question] * config.timing.batch, base.processor, config.timing.batch)
    inputs = moved(prompts.batches[0].inputs, device, dense.dtype)
    for name, point in tqdm.tqdm(missing.items(), desc="timing", unit="arm", disable=None):
        assert point.adapt is not None
        sparse = za.adapt(copy.deepcopy(dense), point.adapt)
        times[name] = {
            "settings": _settings(config, point),
            **_pair(dense, sparse, inputs, config.timing.rounds, device),
        }
        write_json(path, times)
    return times


def _pair(dense: Any, sparse: Any, inputs: dict[str, Any], rounds: int, device: str) -> dict[str, Any]:
    pictures = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}

    def tower() -> None:
        with torch.no_grad():
            dense.get_image_features(**pictures)

    prefill = {DENSE: prefilling(dense, inputs), SPARSE: prefilling(sparse, inputs)}
    decode = {
        name: step(model, prefill[name]().past_key_values, inputs) for name, model in ((DENSE, dense), (SPARSE, sparse))
    }
    first = take_turns({**prefill, TOWER: tower}, rounds, SECONDS, device)
    second = take_turns(decode, rounds, SECONDS, device)
    found = {"prefill": _reading(first), "decode": _reading(second)}
    found["prefill"]["tower_ms"] = read(first[TOWER], None, lambda ours, _: ours).ours_ms
    return found


def _reading(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    seen = read(samples[SPARSE], samples[DENSE], lambda ours, other: ours / other)
    return {
        "ms": seen.ours_ms,
        "dense_ms": seen.other_ms,
        "ratio": seen.ratio,
        "spread": list(seen.spread),
        "rounds": seen.rounds,
        "busy": seen.busy,
    }


def _settings(config: SweepConfig, point: AdaptPoint) -> dict[str, Any]:
    return json.loads(json.dumps({"adapt": point.adapt, "timing": config.timing.model_dump()}))
