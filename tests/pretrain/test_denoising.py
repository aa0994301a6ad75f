"""Transfusion and flow trained by the command: resumed = uninterrupted, and any number of ranks, stages, micro-batches
and pictures a rank."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from pretrain import metrics, run_folder
from pretrain import recipe as recipes
from pretrain.data import Data, micro_batches, open_data
from pretrain.describe import objective_of
from pretrain.pretraining import Pretraining, one_way_mixers
from pretrain.process_group import Ranks
from pretrain.run_folder import DataPosition, Initial
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import one_rendezvous, steady, tiny_recipe
from tests.zoo.helpers import assert_equal
from tools.examples.make_digits import NAMES
from zoo.config import ConfigError, UserError
from zoo.objectives.denoising import Denoising

STEPS = 6
PICTURES = {"type": "continuous_patches", "image_size": 8, "patch": 4, "channels": 1, "mask": "bidirectional"}
EXPERTS = {"type": "moma", "experts": {"text": 2, "image": 2}, "d_ff": 32, "scope": "row"}
LAYER = {"mixer": {"type": "attention", "heads": 2}, "feedforward": EXPERTS, "dropout": 0.1}
UNTIED = {
    "mixer": {"type": "attention", "heads": 2, "untied": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "feedforward": {"type": "dense", "d_ff": 32, "untied": True},
    "untied_norms": True,
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "transfusion": {"type": "transfusion", "limit_before_caption": 0.5, "drop_context": 0.2},
    "flow": {"type": "flow", "drop_context": 0.2, "z_loss": 1e-4},
}
LOSSES = ("loss", "loss/text", "loss/image", "grad_norm")


def recipe(data: Path, run: Path, objective: str, **changes: Any) -> dict[str, Any]:
    """Rows of 24 tokens, many of them without a picture."""
    train = {
        "steps": STEPS,
        "global_batch": 4,
        "micro_batch": 2,
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 3,
    }
    sections: dict[str, Any] = {
        "modalities": {"text": {"type": "bytes"}, "image": PICTURES},
        "model": {"d_model": 32, "layers": [LAYER, LAYER | {"depth": {"type": "mod", "capacity": 0.5}}]},
        "data": {"path": str(data), "sequence_length": 24},
        "train": train | changes.pop("train", {}),
    }
    return tiny_recipe(data, run, **sections, **changes) | {"objective": OBJECTIVES[objective]}


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures with captions before or after them; half of the documents are words alone, and fill a row."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, count in (("train", 60), ("val", 20)):
        documents = []
        for n in range(count):
            parts = [NAMES[n % 10], png(n % 10)] if n % 2 else ["nothing but words here"]
            documents.append(sample(f"{n:03d}", *(parts if n % 4 < 2 else reversed(parts))))
        write_shard(folder / f"digits-{split}-000.tar", documents)
    return folder


def opened(documents: Path) -> Data:
    resolved = recipes.resolve(recipe(documents, documents, "flow"))
    return open_data(resolved.data, resolved.modalities, 0, log=lambda line: None)


def train(folder: Path, name: str, recipe: dict[str, Any]) -> None:
    import pretrain.train

    path = folder / f"{name}-{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert pretrain.train.main([str(path)]) == 0, name


def trained_alone(folder: Path, documents: Path) -> None:
    """One rank: the whole run, and one that stops in the middle and goes on, in other micro-batches."""
    opened(documents)
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for kind in OBJECTIVES:
            train(folder, kind, recipe(documents, folder / kind, kind))
        for kind in OBJECTIVES:
            for name, changes in (("half", {"steps": STEPS // 2}), ("resumed", {})):
                train(folder, name, recipe(documents, folder / f"{kind}-resumed", kind, train=changes))
            train(folder, "ones", recipe(documents, folder / f"{kind}-ones", kind, train={"micro_batch": 1}))


def trained_by_two(folder: Path, documents: Path, stages: tuple[int, ...]) -> None:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for kind in OBJECTIVES:
            for stage in stages:
                zero = {
                    "zero_optimization": {"stage": stage}
                    | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
                }
                name = f"{kind}-two-{stage}"
                changes = {"train": {"micro_batch": 1}, "deepspeed": zero}
                train(folder, name, recipe(documents, folder / name, kind, **changes))
        for stage in stages:
            train_images_alone(folder, documents, stage)


def train_images_alone(folder: Path, documents: Path, stage: int) -> None:
    """A run from given weights in which nothing learns that text meets."""
    run = folder / f"alone-{stage}"
    given = recipe(documents, run, "flow", train={"steps": 2, "trainable": ["image"]}) | {
        "model": {"d_model": 32, "layers": [UNTIED]},
        "optimizer": {"lr": 1e-2, "weight_decay": 0},
        "deepspeed": {"zero_optimization": {"stage": stage}},
    }
    if os.environ["RANK"] == "0":
        model: Any = zoo.build("model", recipes.resolve(given).model, seed=5)
        run_folder.save_initial(run, Initial(model.state_dict(), DataPosition(0, "")))
    torch.distributed.barrier()
    train(folder, run.name, given)


@pytest.fixture(scope="module")
def alone(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("denoising")
    target = "tests.pretrain.test_denoising:trained_alone"
    run_ranks(target, 1, folder / "scratch", 280, folder=folder, documents=documents)
    return folder


def launch_two(documents: Path, folder: Path, stages: tuple[int, ...]) -> None:
    target = "tests.pretrain.test_denoising:trained_by_two"
    run_ranks(target, 2, folder / "two", 400, folder=folder, documents=documents, stages=stages)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_it_learns_and_is_evaluated_at_fixed_times(alone: Path, kind: str) -> None:
    items = metrics.read(alone / kind / "metrics.jsonl")
    steps, last = [item for item in items if "loss" in item], items[-1]
    assert steps[-1]["loss/text"] < steps[0]["loss/text"] and steps[-1]["loss/image"] < steps[0]["loss/image"]
    at = [name for name in last if name.startswith("eval/causal/loss/image@")]
    assert at and {"eval/causal/loss/image", "eval/topk/loss/image", "eval/causal/loss"} <= last.keys()
    whole = last["eval/causal/loss/text"] + 5 * last["eval/causal/loss/image"]
    assert last["eval/causal/loss"] == pytest.approx(whole, rel=1e-3)
    error = opened_error(alone)
    assert last["eval/constant/image"] == pytest.approx(1.0 if kind == "transfusion" else 1 + error)


def opened_error(alone: Path) -> float:
    """The mean squared error of the best constant picture of the held-out ones."""
    resolved = recipes.load(alone / "flow" / "recipe.yaml")
    data = open_data(resolved.data, resolved.modalities, 0, log=lambda line: None)
    return data.constant_error("validation")["image"]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_resumed_is_uninterrupted(alone: Path, kind: str) -> None:
    whole, resumed = ([i for i in steady(alone / name) if "loss" in i] for name in (kind, f"{kind}-resumed"))
    assert whole == resumed
    ours, theirs = (load_file(alone / name / "model.safetensors") for name in (f"{kind}-resumed", kind))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same(run: Path, whole: Path) -> None:
    """Losses of every step, and the weights at the end."""
    one, two = ([i for i in steady(name) if "loss" in i] for name in (whole, run))
    for mine, other in zip(two, one, strict=True):
        for name in LOSSES:
            assert mine[name] == pytest.approx(other[name], rel=1e-3), (mine["step"], name)
    ours, theirs = (load_file(name / "model.safetensors") for name in (run, whole))
    assert_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())), tolerance=2e-2)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_micro_batches_change_nothing(alone: Path, kind: str) -> None:
    assert_same(alone / f"{kind}-ones", alone / kind)


def test_two_ranks_of_which_one_may_have_no_picture(documents: Path, alone: Path) -> None:
    assert_some_rank_has_none(documents)
    launch_two(documents, alone, (2,))
    for kind in OBJECTIVES:
        assert_same(alone / f"{kind}-two-2", alone / kind)
    assert_images_learned_alone(alone / "alone-2")


@pytest.mark.slow
def test_two_ranks_under_every_stage(documents: Path, alone: Path) -> None:
    launch_two(documents, alone, (0, 1, 3))
    for kind in OBJECTIVES:
        for stage in (0, 1, 3):
            assert_same(alone / f"{kind}-two-{stage}", alone / kind)
    for stage in (0, 1, 3):
        assert_images_learned_alone(alone / f"alone-{stage}")


def assert_images_learned_alone(run: Path) -> None:
    initial, trained = run_folder.load_initial(run), load_file(run / "model.safetensors")
    assert initial is not None and initial.weights.keys() == trained.keys()
    changed = {name for name, value in trained.items() if not value.equal(initial.weights[name])}
    stacks = {name for name in trained if name.startswith("layers.")}
    assert changed == stacks | {name for name in trained if ".image." in name}
    for name in stacks:
        text, image = (ours.equal(theirs) for ours, theirs in zip(trained[name], initial.weights[name], strict=True))
        assert text and not image, name


def assert_some_rank_has_none(documents: Path) -> None:
    data = opened(documents)
    held = [
        sum(len(batch.content["image"]) for batch in micro_batches(data.train, range(first, first + 4), 1, Ranks(r, 2)))
        for first in range(0, 4 * STEPS, 4)
        for r in range(2)
    ]
    assert 0 in held and any(held)


# ----------------------------------------------------------------------------------------------------------- the recipe


def test_the_stem_and_the_objective_follow_from_the_mask(documents: Path) -> None:
    resolved = recipes.resolve(recipe(documents, Path("run"), "flow"))
    assert resolved.bidirectional == ("image",)
    assert resolved.model.own_stems["image"].model_dump() == {"type": "noisy_vectors", "width": 16}
    assert isinstance(objective_of(resolved), Denoising)


def test_a_stem_that_is_not_told_the_noise_is_refused(documents: Path) -> None:
    wrong = recipe(documents, Path("run"), "flow")
    wrong["model"] |= {"stem": {"image": {"type": "vectors", "width": 16}}}
    with pytest.raises(ConfigError, match="^model.stem.image.type: 'vectors' cannot be told how much noise there is"):
        recipes.resolve(wrong)


def test_mixers_that_stay_causal_are_named_once(documents: Path) -> None:
    given = recipe(documents, Path("run"), "flow")
    assert one_way_mixers(recipes.resolve(given)) == []
    given["model"]["layers"] = [{"mixer": {"type": "mamba"}, "repeat": 2}, *given["model"]["layers"]]
    (line,) = one_way_mixers(recipes.resolve(given))
    assert line.startswith("model: the mixer mamba stays causal inside an item of image;")


def test_modalities_that_cannot_train_alone(documents: Path) -> None:
    def message(trainable: Any, decay: float = 0.0) -> str:
        given = recipe(documents, Path("run"), "flow", train={"trainable": trainable})
        with pytest.raises(ConfigError) as error:
            recipes.resolve(given | {"optimizer": {"lr": 1e-2, "weight_decay": decay}})
        return str(error.value)

    assert message(["images"]).endswith("unknown modality; model.modalities are text, image (did you mean 'image'?)")
    assert "names some of the modalities text, image, so that the others are frozen" in message(["image", "text"])
    assert message([]).startswith("train.trainable: []: names some of the modalities")
    assert message(["image"], decay=0.1).startswith("optimizer.weight_decay: 0.1 would shrink the frozen weights")
    assert message("image").startswith("train.trainable: 'image': must be all, auxiliary, or a list of modalities")
    given = recipes.resolve(
        recipe(documents, Path("run"), "flow", train={"trainable": ["image"]})
        | {"optimizer": {"lr": 1e-2, "weight_decay": 0}}
    )
    with pytest.raises(UserError, match=r"no trained model to freeze.* python -m tools.upcycle RUN RECIPE"):
        Pretraining(given, opened(documents), {}, "cpu", None)
