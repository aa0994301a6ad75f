"""`python -m tools.train_routers` on real ranks: the main model does not move by a bit, its routers learn."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from pretrain import metrics, run_folder, second_stage
from pretrain.data import micro_batches, open_data
from pretrain.optim import learning_rate_factor, parameter_groups
from pretrain.pretraining import auxiliary_routers
from pretrain.recipe import Recipe
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import LAYER, launch, one_rendezvous, start, tiny_recipe
from tools import train_routers
from zoo import Trace, UserError

QUICK, REST = [(3, "fp32")], [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
BLIND = copy.deepcopy(LAYER) | {"feedforward": LAYER["feedforward"] | {"auxiliary": False}}
LAYERS = [BLIND, BLIND | {"depth": {"type": "mod", "capacity": 0.5, "auxiliary": False}}]
STEPS, ROWS = 4, 8
SHORT = (f"train.steps={STEPS}", "train.evaluate_every=2", "train.checkpoint_every=2", "optimizer.lr=0.01")
STEADY = ("schedule={type: wsd, decay_steps: 1}",)
"""The fall begins at the last step, where its factor is still 1: train.steps may change and no rate does."""


def seed(data: Path, run: Path, stage: int, precision: str, **changes: Any) -> dict[str, Any]:
    """The recipe of a main training without causal routers."""
    model = tiny_recipe(data, run)["model"] | {"layers": LAYERS}
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    sections = {"model": model, "train": {"steps": 3, "precision": precision}}
    return tiny_recipe(data, run, **sections | {"deepspeed": {"zero_optimization": zero}} | changes)


def both_stages(data: Path, folder: Path, cases: list[tuple[int, str]]) -> None:
    """What two ranks do: a main training and its second stage for each of `cases`, whole and in two parts."""
    import pretrain.train

    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for stage, precision in cases:
            run = folder / f"{stage}-{precision}"
            path = folder / f"{run.name}-{os.environ['RANK']}.yaml"
            path.write_text(yaml.safe_dump(seed(data, run, stage, precision)))
            assert pretrain.train.main([str(path)]) == 0
            assert train_routers.main([str(run), *SHORT, *STEADY, f"train.calibrate_rows={ROWS}"]) == 0
            parts = [str(run), *STEADY, f"run_dir={run}_parts", f"train.calibrate_rows={ROWS}"]
            assert train_routers.main([*parts, *SHORT, "train.steps=2"]) == 0
            assert train_routers.main([*parts, *SHORT]) == 0


@pytest.fixture(scope="module")
def runs(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(digit_shards, tmp_path_factory.mktemp("routers"), QUICK)


@pytest.fixture(scope="module")
def rest(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(digit_shards, tmp_path_factory.mktemp("rest"), REST)


def trained(data: Path, folder: Path, cases: list[tuple[int, str]]) -> Path:
    target = "tests.tools.test_train_routers:both_stages"
    run_ranks(target, 2, folder / "scratch", 280, data=data, folder=folder, cases=cases)
    return folder


@pytest.fixture
def main(request: pytest.FixtureRequest, stage: int, precision: str) -> Path:
    """The run folder of a main training; beside it are those of its second stage, `_routers` and `_parts`."""
    folder = request.getfixturevalue("runs" if (stage, precision) in QUICK else "rest")
    return folder / f"{stage}-{precision}"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def assert_main_model_untouched(run: Path, main: Path) -> None:
    """Bit for bit; what `run` has besides are auxiliary routers."""
    before, after = weights(main), weights(run)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    added = after.keys() - before.keys()
    assert added and all(".auxiliary." in name for name in added)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_only_the_routers_learn(main: Path) -> None:
    run = main.with_name(f"{main.name}_routers")
    assert_main_model_untouched(run, main)
    items = metrics.read(run / "metrics.jsonl")
    evaluations = [item for item in items if "eval/topk/loss" in item]
    assert len({item["eval/topk/loss"] for item in evaluations}) == 1, "the model that is evaluated has changed"
    final = [item for item in metrics.read(main / "metrics.jsonl") if "eval/topk/loss" in item][-1]
    assert "eval/causal/loss" not in final
    assert evaluations[-1]["eval/topk/loss"] == pytest.approx(final["eval/topk/loss"], rel=1e-6)
    assert evaluations[-1]["eval/causal/loss"] > 0
    for block in ("layers.0.feedforward.groups.text", "layers.1", "layers.1.block.feedforward.groups.image"):
        for rate in ("accuracy", "precision", "recall", "always_skip"):
            assert 0 <= evaluations[-1][f"eval/auxiliary/{block}/{rate}"] <= 1
    steps = [item for item in items if "auxiliary/loss" in item]
    assert steps[-1]["auxiliary/loss"] < steps[0]["auxiliary/loss"]


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_it_does_what_plain_torch_does(main: Path, precision: str) -> None:
    if precision == "bf16":
        pytest.skip("plain torch trains in fp32 here")
    ours = weights(main.with_name(f"{main.name}_routers"))
    for name, value in plain(main.with_name(f"{main.name}_parts"), main).items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


def plain(run: Path, main: Path) -> dict[str, torch.Tensor]:
    """The auxiliary routers that the same micro-batches give under torch's AdamW, the model in evaluation mode."""
    model, recipe = run_folder.load_model(run)
    zoo.initialise(model, recipe.seed)
    model.load_state_dict(weights(main), strict=False)
    routers = {name: p for name, p in model.named_parameters() if ".auxiliary." in name}
    for router in auxiliary_routers(model).values():
        router.threshold = torch.zeros_like(router.threshold)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in routers)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe.optimizer))
    assert [group["eps"] for group in optimizer.param_groups] == [recipe.optimizer.eps]
    data, train = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda line: None), recipe.train
    for step in range(STEPS):
        first = run_folder.position(main).row + step * train.global_batch
        batches = micro_batches(
            data.train, range(first, first + train.global_batch), train.micro_batch, step=step, seed=recipe.seed
        )
        tokens = sum(sum(batch.context.totals) for batch in batches)
        for batch in batches:
            trace = Trace()
            model(batch.tokens, batch.context.replace(trace=trace))
            (sum(total for total, _ in trace.losses.values()) / tokens).backward()
        torch.nn.utils.clip_grad_norm_(routers.values(), train.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.optimizer.lr * learning_rate_factor(recipe.schedule, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in routers.items()}


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_run_in_two_parts_is_the_run_in_one(main: Path) -> None:
    run, parts = main.with_name(f"{main.name}_routers"), main.with_name(f"{main.name}_parts")
    whole = [item for item in metrics.read(run / "metrics.jsonl") if item["step"] > 2]
    rest = [item for item in metrics.read(parts / "metrics.jsonl") if item["step"] > 2]
    assert [item.get("auxiliary/loss") for item in whole] == [item.get("auxiliary/loss") for item in rest]
    ours, theirs = weights(parts), weights(run)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [*QUICK, *REST])
def test_another_number_of_ranks_goes_on(main: Path, tmp_path: Path) -> None:
    run = main.with_name(f"{main.name}_routers")
    arguments = [main, *SHORT, *STEADY, f"train.steps={STEPS + 1}"]
    processes = start(arguments, tmp_path / "printed", module="tools.train_routers")
    assert processes.wait() == [0], processes.printed()
    assert f"resuming {run} at step {STEPS} of {STEPS + 1}" in processes.printed()
    assert_main_model_untouched(run, main)


@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_a_checkpoint_gives_whole_weights_without_an_engine(main: Path) -> None:
    for run in (main, main.with_name(f"{main.name}_parts")):
        read, saved = run_folder.newest_weights(run), weights(run)
        assert read.keys() == saved.keys()
        assert all(torch.equal(read[name].to(saved[name].dtype), saved[name]) for name in saved)


def test_thresholds_are_those_of_calibration(runs: Path) -> None:
    model, recipe = run_folder.load_model(runs / "3-fp32_parts")
    routers = auxiliary_routers(model)
    kept = {name: router.threshold.clone() for name, router in routers.items()}
    assert all(value.abs().min() > 0 for value in kept.values())
    for router in routers.values():
        router.threshold = torch.zeros_like(router.threshold)
    data, train = open_data(recipe.data, recipe.modalities, recipe.seed, log=lambda line: None), recipe.train
    first = run_folder.position(runs / "3-fp32_parts").row
    batches = micro_batches(data.train, range(first, first + ROWS), train.micro_batch, step=STEPS, seed=recipe.seed)
    zoo.calibrate(model, batches)
    for name, router in routers.items():
        torch.testing.assert_close(router.threshold, kept[name], rtol=0, atol=1e-5)


def test_the_documented_command(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [runs / "3-fp32", *SHORT, f"run_dir={run}", "deepspeed.zero_optimization.stage=2"]
    processes = launch(arguments, tmp_path / "printed", module="tools.train_routers")
    assert processes.wait() == [0], processes.printed()
    assert_main_model_untouched(run, runs / "3-fp32")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert recipe["schedule"] == {"type": "linear", "warmup_steps": 0, "final_fraction": 0.01, "decay_steps": None}
    assert recipe["name"] == "tiny_routers"


# ----------------------------------------------------------------------------------------------- no processes, one rank


def test_the_papers_settings_are_the_default(runs: Path) -> None:
    recipe = second_stage.second_stage(runs / "3-fp32")
    assert (recipe.train.steps, recipe.schedule.warmup_steps) == (10_000, 2_000)
    assert (recipe.optimizer.lr, recipe.schedule.type, recipe.schedule.final_fraction) == (1e-4, "linear", 0.01)
    assert second_stage.second_stage(runs / "3-fp32", ["train.steps=50"]).schedule.warmup_steps == 10
    chosen = second_stage.second_stage(runs / "3-fp32", ["train.steps=50", "schedule.warmup_steps=3"])
    assert chosen.schedule.warmup_steps == 3


def test_routers_that_are_there_go_on_or_begin_anew(runs: Path, tmp_path: Path) -> None:
    trained = weights(runs / "3-fp32_parts")
    name = "layers.0.feedforward.groups.text.auxiliary.w_in"
    for fresh in (False, True):
        recipe: Recipe = second_stage.second_stage(runs / "3-fp32_parts", [f"run_dir={tmp_path / str(fresh)}"])
        initial = second_stage.begin(runs / "3-fp32_parts", recipe, fresh)
        assert torch.equal(initial.weights[name], trained[name]) is not fresh
        assert initial.position.row == 4 * (3 + STEPS)
        kept = run_folder.load_initial(recipe.folder).weights
        assert all(torch.equal(value, kept[key]) for key, value in initial.weights.items())


def test_what_is_not_possible_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: object) -> str:
        assert train_routers.main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    main = runs / "3-fp32"
    assert "recipe.yaml: does not exist; give the folder of a run" in refused(tmp_path)
    assert "model.d_model: 32 there, 64 here" in refused(main, "model.d_model=64")
    assert "model.layers[0].feedforward.auxiliary: True there, False here" in refused(
        main, "model.layers.0.feedforward.auxiliary=false"
    )
    assert "modalities.image.channels: 1 there, 3 here" in refused(main, "modalities.image.channels=3")
    assert "the seed's own folder" in refused(main, f"run_dir={main}")
    assert "is what this command does" in refused(main, "train.trainable=all")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "recipe.yaml").write_text((main / "recipe.yaml").read_text())
    assert "holds no complete checkpoint" in refused(empty)
    dense = tmp_path / "dense"
    shutil.copytree(main, dense)
    recipe = yaml.safe_load((main / "recipe.yaml").read_text())
    recipe["model"]["layers"] = [LAYER | {"feedforward": {"type": "dense", "d_ff": 32}}]
    (dense / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "train.trainable: the model has no auxiliary routers" in refused(dense)
    assert not (tmp_path / "dense_routers").exists()


def test_a_frozen_run_needs_a_trained_model(digit_shards: Path, tmp_path: Path) -> None:
    from pretrain import recipe as recipes
    from pretrain.pretraining import Pretraining

    recipe = recipes.resolve(tiny_recipe(digit_shards, tmp_path / "run", train={"trainable": "auxiliary"}))
    with pytest.raises(UserError, match="no trained model to freeze"):
        Pretraining(recipe, open_data(recipe.data, recipe.modalities, 0, log=lambda line: None), {}, "cpu", None)
