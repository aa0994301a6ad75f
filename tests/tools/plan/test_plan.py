"""`python -m tools.plan`: the arithmetic of its model by hand, and what it prints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pretrain import recipe as recipes
from pretrain.describe import blueprint, describe
from pretrain.recipe import Recipe
from tests.pretrain.runs import ROOT
from tools.plan import __main__ as command
from tools.plan.accelerators import KNOWN, Accelerator
from tools.plan.estimate import UPDATE_BYTES, estimate, flops_per_token, traffic
from tools.plan.layouts import layouts

SLOW = Accelerator("slow", {"fp32": 1e9, "bf16": 2e9}, 1e9, 1e9, 2, 1e6, 1e5)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipes.load(ROOT / "recipes/tiny/dense.yaml", ["train.global_batch=8", "train.micro_batch=1"])


@pytest.mark.parametrize(
    ("stage", "passes", "share"), [(0, 4, 2), (1, 4, 2), (2, 1, 2), (2, 4, 5), (3, 1, 3), (3, 4, 12)]
)
def test_traffic(stage: int, passes: int, share: int) -> None:
    """With 1,000 weights of 2 bytes on 4 ranks, 1,500 bytes go round at a time; a single rank sends nothing."""
    assert traffic(1000, stage, 4, passes, 2) == 1500 * share
    assert traffic(1000, stage, 1, passes, 2) == 0


def test_a_step(recipe: Recipe) -> None:
    """Everything by hand: compute, the optimizer's memory, and what communication the compute does not hide."""
    model = blueprint(recipe)
    parameters, flops = sum(p.numel() for p in model.parameters()), flops_per_token(recipe, model)
    cost = model.cost(recipe.data.sequence_length)
    assert flops == 3 * sum(cost.expand(2).flops) / 2, "a dense model has no routers"
    found = estimate(recipe, model, SLOW, 4, 1, efficiency=0.5, overlap=0.25)
    assert found.tokens == 8 * recipe.data.sequence_length
    assert found.compute == pytest.approx(flops * found.tokens / 4 / 0.5e9)
    assert found.optimizer == pytest.approx(UPDATE_BYTES * parameters / 4 / 1e9)
    assert found.bytes_sent == 2 * parameters * 4 * 0.75
    assert found.communication == pytest.approx(found.bytes_sent / 1e5), "four ranks are two nodes"
    hidden = found.communication - 0.25 * found.compute
    assert found.seconds == pytest.approx(found.compute + found.optimizer + hidden)
    assert found.utilisation == pytest.approx(flops * found.tokens / 4 / found.seconds / 1e9)
    assert found.days(found.tokens * 86_400) == pytest.approx(found.seconds)
    two = estimate(recipe, model, SLOW, 2, 1)
    assert two.communication == pytest.approx(two.bytes_sent / 1e6), "two are one node"


def test_recomputation_is_time_and_no_use(recipe: Recipe) -> None:
    model = blueprint(recipe)
    again = recipes.resolve({**recipe.dump(), "train": recipe.dump()["train"] | {"activation_checkpointing": True}})
    plain, full = (estimate(each, model, KNOWN["h100"], 1, 1) for each in (recipe, again))
    assert full.compute == pytest.approx(plain.compute * 4 / 3) and full.utilisation < plain.utilisation


def test_the_ratio_of_the_data_weighs_modalities() -> None:
    """Without one all modalities count alike; of data that hold text alone, text alone counts."""
    words = ["data.path=x", "model.layers.0.feedforward={type: moma, experts: {text: 1, image: 4}, d_ff: 64}"]
    both, text = (
        recipes.load(ROOT / "recipes/tiny/moma.yaml", [*words, *more])
        for more in ([], ["data.sources={a: {type: documents, path: .}}", "data.token_ratio={text: 1}"])
    )
    model = blueprint(both)
    cost = model.cost(both.data.sequence_length).expand(2)
    each = [3 * (cost.flops[m] + cost.router[m] + cost.auxiliary[m]) for m in range(2)]
    assert flops_per_token(both, model) == pytest.approx(sum(each) / 2)
    assert flops_per_token(text, model) == pytest.approx(each[0])


def test_what_it_prints(recipe: Recipe) -> None:
    model = blueprint(recipe)
    found = layouts(recipe, model, 4)
    by_way = {(each.precision, each.checkpointing, each.memory.zero_stage): each.memory for each in found}
    assert len(by_way) == 2 * 3 * 4 - 3, "bf16 wants ZeRO"
    for precision in ("bf16", "fp32"):
        held = [by_way[precision, "none", stage] for stage in (1, 2, 3)]
        assert held[0].gradients >= held[1].gradients and held[1].weights > held[2].weights
        assert held[0].peak > held[0].on_device and held[0].activations == held[2].activations
        none, full = (by_way[precision, name, 1].activations for name in ("none", "full"))
        assert none is not None and full is not None and none.peak > full.peak > 0
    told = describe(recipe, model, 4)["memory_per_rank"]
    assert by_way["fp32", "none", 2].facts() == told, "what the recipe says itself"
    steps = {stage: estimate(recipe, model, KNOWN["h100"], 4, stage) for stage in (0, 1)}
    text = command.show(recipe, model, KNOWN["h100"], 4, found, steps, 1e9)
    assert "An estimate: nothing has run" in text and "days for 1B tokens" in text and "| fp32 | none |" in text
    assert "own is fp32, checkpointing none, stage 2" in text and " !" not in text
    assert " !" in command.show(recipe, model, dataclasses.replace(SLOW, memory=1e5), 4, found, steps, None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--count", "0"], "--count: 0 is out of range; give 1 or more"),
        (["--efficiency", "1.5"], "--efficiency: 1.5 is out of range; give a share"),
        (["--count", "3"], "micro_batch"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    path = Path("recipes/tiny/dense.yaml")
    assert command.main([str(ROOT / path), "data.path=x", *words]) == 2
    assert said in capsys.readouterr().err
