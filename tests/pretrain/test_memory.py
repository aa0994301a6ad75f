"""Memory a rank: counted storages against the allocator, the meta device against a CPU, and every shipped section."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import zoo
from pretrain import memory
from pretrain import recipe as recipes
from pretrain.describe import blueprint, objective_of
from pretrain.memory import Activations, RankMemory
from tests.pretrain.runs import write_recipe
from zoo import ConfigError
from zoo.batch import Batch

ROOT = Path(__file__).parents[2]
H100 = 80e9
"""Bytes of the accelerator that the recipes of recipes/models are for: an H100 of 80 GB."""
LAYER = {
    "mixer": {"type": "attention", "heads": 4, "qk_norm": True},
    "feedforward": {"type": "moma", "experts": {"text": 2, "image": 2}, "d_ff": 512},
    "norm": "post",
}


def recipe(tmp_path: Path, *overrides: str, **model: Any) -> recipes.Recipe:
    """Rows of 1,024 tokens, width 256, 8,192 ids."""
    model = {"d_model": 256, "vocab_size": 8192, "layers": [LAYER], "repeat": 3} | model
    data = {"sequence_length": 1024}
    file = write_recipe(tmp_path, "nowhere", tmp_path / "run", model=model, data=data, train={"micro_batch": 2})
    return recipes.load(file, [*overrides])


def on_cpu(given: recipes.Recipe) -> tuple[zoo.Model, zoo.Objective, Any]:
    """The model with weights, its objective, and a batch whose rows are one document, as plain attention takes it."""
    model = zoo.build("model", given.model, activation_checkpointing=given.train.activation_checkpointing)
    batch = memory.batch_of(given)
    context = zoo.TokenContext.from_modality(batch.context.modality, modalities=model.modalities)
    return model, objective_of(given), Batch(batch.tokens, context)


def allocated(run: Any) -> int:
    """Most bytes that the allocator had given out at once while `run` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events: Any = found.profiler
    changes = sorted((e.start_ns(), e.nbytes()) for e in events.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", ["false", "selective", "true"])
def test_counted_storages_are_what_the_allocator_gives(tmp_path: Path, checkpointing: str) -> None:
    """On a CPU, within 5 %, and what is counted without values is what is counted with them."""
    given = recipe(tmp_path, f"train.activation_checkpointing={checkpointing}")
    model, objective, batch = on_cpu(given)
    memory.measure(model, objective, batch)  # what is made once is there
    counted: list[Activations] = []
    real = allocated(lambda: counted.append(memory.measure(model, objective, batch)))
    assert counted[0].peak == pytest.approx(real, rel=0.05)
    assert counted[0].held <= counted[0].peak


def test_without_values_as_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm as a CPU has it on both sides; attention keeps the same on both."""
    given = recipe(tmp_path)
    model, objective, batch = on_cpu(given)
    monkeypatch.setattr(memory, "_FusedNorm", contextlib.nullcontext)
    outlined = memory.measure(memory._outline(given, 3), objective, batch)
    real = memory.measure(model, objective, batch)
    assert outlined.peak == pytest.approx(real.peak, rel=0.05)
    assert outlined.held == pytest.approx(real.held, rel=0.05)


@pytest.mark.parametrize("checkpointing", ["false", "selective", "true"])
def test_further_layers_add_what_one_adds(tmp_path: Path, checkpointing: str) -> None:
    given = recipe(tmp_path, f"train.activation_checkpointing={checkpointing}", repeat=6)
    batch, objective = memory.batch_of(given), objective_of(given)
    assert memory.activations(given, objective) == memory.measure(memory._outline(given, 6), objective, batch)


def test_checkpointing_saves(tmp_path: Path) -> None:
    def held(value: str) -> int:
        given = recipe(tmp_path, f"train.activation_checkpointing={value}")
        found = memory.activations(given, objective_of(given))
        assert found is not None
        return found.held

    assert held("true") < 0.8 * held("selective") < 0.8 * held("false")


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    held = RankMemory(2, 8, 30 << 30, 10 << 30, 20 << 30, False, 0, Activations(5 << 30, 4 << 30, 0))
    memory.check_fits(held, 75 << 30)
    with pytest.raises(ConfigError) as error:
        memory.check_fits(held, 64 << 30)
    text = str(error.value)
    assert "stage: 2 on 8 rank(s) needs 66.7 GiB a rank (60.0 GiB of weights" in text and "has 64.0 GiB" in text
    assert "train.activation_checkpointing: true" in text and "offload_optimizer" in text


TIGHT = ("mixture_of_mamba_443m", "mod_moma_4t4i_1.4b", "mot_7b")
"""The recipes with the most activations or weights; the others are tested among those that take long."""
OTHERS = sorted({file.stem for file in (ROOT / "recipes/models").glob("*.yaml")} - {*TIGHT})


@pytest.mark.parametrize("name", [*TIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_shipped_recipes_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each recipe on 8 accelerators, as its command launches it, with a tenth to spare. On 256, which have the same
    ZeRO stage, a rank holds less."""
    monkeypatch.chdir(ROOT)
    given = recipes.load(f"recipes/models/{name}.yaml")
    parameters = sum(p.numel() for p in blueprint(given).parameters())
    needed = memory.of_rank(given, objective_of(given), parameters, 8)
    assert needed.activations is not None
    memory.check_fits(needed, H100)
