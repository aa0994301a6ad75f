"""Two ranks train what one plain PyTorch process trains, also where one holds nothing but text and the other images."""

from __future__ import annotations

import contextlib
import io
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from pretrain import recipe as recipes
from pretrain.optim import AUXILIARY_SCALE, parameter_groups
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import EXPERTS, LAYER, one_rendezvous, steady, tiny_recipe
from zoo import TokenContext, Trace
from zoo.batch import Batch
from zoo.modalities import vocabulary

STEPS, ROWS, LENGTH = 20, 2, 24
APART = [(stage, accumulated) for stage in range(4) for accumulated in (1, 2)]
BY_ROW = LAYER | {"feedforward": EXPERTS | {"scope": "row"}}
MODELS = {
    "dense": [LAYER | {"feedforward": {"type": "dense", "d_ff": 64}}] * 2,
    "sparse": [BY_ROW, BY_ROW | {"depth": {"type": "mod", "capacity": 0.5, "scope": "row"}}],
}
SPLITS = {1: (8, 2), 2: (4, 1)}
"""Ranks → rows of a micro-batch; eight rows a step."""


def apart(data: Path, folder: Path, stage: int, accumulated: int) -> dict[str, Any]:
    """The recipe of a run whose ranks never see the same modality."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    train = {"steps": STEPS, "micro_batch": ROWS, "global_batch": 2 * ROWS * accumulated}
    changes = {"train": train, "deepspeed": {"zero_optimization": zero}, "data": {"validation": None}}
    return tiny_recipe(data, folder / f"apart-{stage}-{accumulated}", **changes)


def one_modality(modality: int, step: int, number: int, words: Any) -> Batch:
    """Rows of two documents, of different length, and some padding; nothing but `modality` in them."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * number + modality)
    first, stop = words.range(("text", "image")[modality])
    # A few ids only, in order, so that there is something to learn.
    tokens = first + torch.randint(0, 5, (ROWS, 1), generator=generator) + torch.arange(LENGTH) % 6
    assert int(tokens.max()) < stop
    document = (torch.arange(LENGTH) >= 9).long().expand(ROWS, -1).clone()
    document[:, LENGTH - 1 - number :] = -1
    kind = torch.where(document >= 0, modality, -1)
    context = TokenContext.from_modality(kind, document, modalities=("text", "image"), step=step)
    return Batch(torch.where(document >= 0, tokens, 0), context)


def trained_apart(data: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What two ranks do: `APART` on hand-made batches, then `MODELS` on the digits. Returns the latter's gradients."""
    from pretrain.pretraining import Pretraining

    rank = int(os.environ["RANK"])
    taken = Pretraining.batches

    def batches(self: Any, state: Any) -> list[Batch]:
        count = self.recipe.train.global_batch // (2 * ROWS)
        return [one_modality(rank, state.step, number, self.data.vocabulary) for number in range(count)]

    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        Pretraining.batches = batches  # type: ignore[method-assign]
        for stage, accumulated in APART:
            train(folder, apart(data, folder, stage, accumulated))
        Pretraining.batches = taken  # type: ignore[method-assign]
        return trained_together(data, folder)


def trained_together(data: Path, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """`MODELS` on the digits in every split of this number of ranks; the gradients of the first step, unclipped."""
    import deepspeed.utils

    import pretrain.engine

    world = int(os.environ["WORLD_SIZE"])
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    plain_step = pretrain.engine.Engine.step

    def recorded(self: Any, factor: float) -> Any:
        if name not in gradients:
            named = self.module.module.named_parameters()
            gradients[name] = {k: deepspeed.utils.safe_get_full_grad(p).clone() for k, p in named}
        return plain_step(self, factor)

    pretrain.engine.Engine.step = recorded  # type: ignore[method-assign]
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for model, layers in MODELS.items():
            for micro in SPLITS[world]:
                name = f"{model}-{world}x{micro}"
                changes: dict[str, Any] = {"train": {"steps": 6, "global_batch": 8, "micro_batch": micro}}
                changes |= {"model": {"layers": layers}, "evaluate": {"rows": 16}}
                train(folder, tiny_recipe(data, folder / name, **changes))
    pretrain.engine.Engine.step = plain_step  # type: ignore[method-assign]
    return gradients


def train(folder: Path, recipe: dict[str, Any]) -> None:
    import pretrain.train

    path = folder / f"{Path(recipe['run_dir']).name}-{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert pretrain.train.main([str(path)]) == 0


@pytest.fixture(scope="module")
def two(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("two")
    target = "tests.pretrain.test_two_ranks:trained_apart"
    return folder, run_ranks(target, 2, folder / "scratch", 280, folder=folder, data=digit_shards)


@pytest.fixture(scope="module")
def one(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("one")
    target = "tests.pretrain.test_two_ranks:trained_together"
    return folder, run_ranks(target, 1, folder / "scratch", 280, folder=folder, data=digit_shards)


# ------------------------------------------------------------------------------------------------ modalities kept apart


@pytest.fixture(scope="module")
def reference(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Accumulated micro-batches → losses, norms and final weights of one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("reference")
    return {accumulated: plain(recipes.resolve(apart(digit_shards, folder, 0, accumulated))) for accumulated in (1, 2)}


def plain(recipe: recipes.Recipe) -> dict[str, Any]:
    """The same micro-batches, one after the other, under torch's own AdamW."""
    words = vocabulary(recipe.modalities)
    model: Any = zoo.build("model", recipe.model, seed=recipe.seed).train()
    objective: Any = zoo.build("objective", recipe.objective, d_model=32, modalities=model.modalities)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.optimizer))
    losses, norms = [], []
    for step in range(STEPS):
        accumulated = recipe.train.global_batch // (2 * ROWS)
        batches = [one_modality(m, step, number, words) for m in (0, 1) for number in range(accumulated)]
        each = [objective.counts(batch) for batch in batches]
        counts = {name: sum(c[name] for c in each) for name in objective.parts}
        tokens = sum(sum(batch.context.totals) for batch in batches)
        total = 0.0
        for batch in batches:
            trace = Trace()
            parts = objective(model, batch.under(trace=trace))
            main = objective.combine(parts, counts)
            auxiliary = sum(part for part, _ in trace.losses.values())
            (main + AUXILIARY_SCALE * auxiliary / tokens).backward()
            total += float(main.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.clip)))
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": losses, "grad_norm": norms, "weights": {k: v.detach() for k, v in model.state_dict().items()}}


@pytest.mark.parametrize(("stage", "accumulated"), APART)
def test_one_rank_text_one_rank_images(
    two: tuple[Path, list[Any]], reference: dict[int, dict[str, Any]], stage: int, accumulated: int
) -> None:
    run, expected = two[0] / f"apart-{stage}-{accumulated}", reference[accumulated]
    items = steady(run)
    for name in ("loss", "grad_norm"):
        assert [item[name] for item in items] == pytest.approx(expected[name], rel=1e-5), name
    assert items[-1]["loss"] < 0.5 * items[0]["loss"]
    weights = load_file(run / "model.safetensors")
    assert weights.keys() == expected["weights"].keys()
    for name, value in weights.items():
        other = expected["weights"][name]
        assert float((value - other).abs().max()) < 1e-4 * max(1.0, float(other.abs().max())), name


# ----------------------------------------------------------------------------------------------- ranks and accumulation


@pytest.mark.parametrize("split", ["1x2", "2x4", "2x1"])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_and_micro_batches_change_nothing(
    one: tuple[Path, list[Any]], two: tuple[Path, list[Any]], model: str, split: str
) -> None:
    """Eight rows on one rank at once = in four pieces = on two ranks = on two ranks in pieces."""
    folder, results = one if split.startswith("1") else two
    name, whole = f"{model}-{split}", f"{model}-1x8"
    for mine, other in zip(steady(folder / name), steady(one[0] / whole), strict=True):
        assert mine.keys() == other.keys()
        for key in mine:
            if "loss" in key or key == "grad_norm":
                assert mine[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), (mine["step"], key)
            elif key in ("tokens", "flops", "lr", "bad_steps"):
                assert mine[key] == other[key]
    gradients, expected = results[0][name], one[1][0][whole]
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        largest = float(expected[key].abs().max())
        assert math.isfinite(largest) and float((gradient - expected[key]).abs().max()) <= 1e-4 * largest, key
