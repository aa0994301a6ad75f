"""`python -m tools.sweep`, `type: adapt`: arms of equal FLOPs, restartable runs, a report that says what results
say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.pretrain.finetune.tuning import write_base, write_data
from tests.pretrain.runs import Processes, environment
from tests.tools.sweep.adapt.sweeps import ARMS, RECIPES, config, parsed, write_sweep
from tests.zoo.adapt.families import llava
from tools.sweep import __main__ as command
from tools.sweep import launch
from tools.sweep.adapt.plan import AdaptPoint, Planner, layer_sets, solve
from tools.sweep.adapt.sweep import AdaptSweep, base_recipe
from tools.sweep.folder import check_folder
from tools.sweep.kinds import open_sweep
from tools.sweep.run import main as run_one
from zoo.config import ConfigError, UserError

RANKS = [0.9, 0.3, 0.1, 0.2, 0.5]


@pytest.mark.parametrize(
    ("rule", "sets"),
    [
        ("all", [[1, 2, 3, 4]]),
        ("every_second", [[1, 3], [1, 2, 3, 4]]),
        ("alternate", [[3], [1, 4], [1, 3, 4], [1, 2, 3, 4]]),
        ("arank", [[2], [2, 3], [1, 2, 3], [1, 2, 3, 4]]),
        ("arank_high", [[4], [1, 4], [1, 3, 4], [1, 2, 3, 4]]),
    ],
)
def test_rules_of_layers(rule: str, sets: list[list[int]]) -> None:
    assert layer_sets(rule, [1, 2, 3, 4], RANKS, 0) == sets


def test_alternate_is_spread_from_the_first_to_the_last() -> None:
    """Every other layer at half of them; the last one, which costs least to lose, is there as ARank may have it."""
    sets = layer_sets("alternate", range(1, 8), [], 0)
    assert sets[3] == [1, 3, 5, 7] and sets[2] == [1, 4, 7]
    assert all(len(set(layers)) == number + 1 for number, layers in enumerate(sets))


def test_random_layers_are_of_the_seed() -> None:
    drawn = [layer_sets("random", range(1, 8), RANKS, seed) for seed in range(20)]
    assert drawn[3] == layer_sets("random", range(1, 8), RANKS, 3)
    assert len({tuple(sets[2]) for sets in drawn}) > 8
    for sets in drawn:
        assert all(set(few) < set(more) and sorted(few) == few for few, more in zip(sets, sets[1:], strict=False))


def test_solve_finds_the_nearest_step() -> None:
    def ratio(x: float) -> float:
        return 0.2 + 0.05 * int(16 * x)

    assert ratio(solve(ratio, 0.52, 0, 1)) == pytest.approx(0.5) and ratio(solve(ratio, 0.53, 0, 1)) == pytest.approx(
        0.55
    )
    assert solve(lambda x: x, 0.3333, 0, 1) == pytest.approx(0.3333, abs=1e-4)
    assert solve(lambda x: x, 2.0, 0, 1) == 1 and solve(lambda x: x, -1.0, 0.25, 1) == 0.25


# ---------------------------------------------------------------------------------------------------------------- plans


def planned(tmp_path: Path, **changes: Any) -> tuple[Planner, list[AdaptPoint]]:
    """Points for a decoder of four layers and prompts of 264 or 268 tokens, 256 of them an image's."""
    sweep = parsed(tmp_path, **changes)
    shapes = Counter({(264, (256,)): 2, (268, (256,)): 1})
    with torch.device("meta"):
        model = llava(num_hidden_layers=8)
    planner = Planner(sweep, model, lambda adapt: shapes, [0.9, 0.3, 0.1, 0.2, 0.5, 0.6, 0.05, 0.01])
    return planner, planner.points()


def test_points_meet_their_targets(tmp_path: Path) -> None:
    planner, points = planned(tmp_path, arms=ARMS, targets=[0.7, 0.5, 0.3], seeds=[0, 1], last_layer=True)
    assert len(points) == 2 + 2 * 3 * 6
    for point in points:
        assert not point.problem, point
        assert point.flops == pytest.approx(point.target, rel=0.02)
        if point.adapt is not None:
            assert planner.ratio(point.adapt) == point.flops
    by = {(p.arm, p.target, p.seed): p for p in points}
    few = by["arank", 0.7, 0]
    assert list(few.capacities) == [2, 6, 7] and min(few.capacities.values()) >= 0.1 and not few.void, (
        "lowest ARank, fewest layers"
    )
    assert few.adapt["last_layer"] and few.adapt["inference"] == {"rule": "topk", "text": "keep"}
    all_of_them = [by[arm, 0.3, 0] for arm in ("arank", "random", "alternate")]
    assert all(p.void and list(p.capacities) == [1, 2, 3, 4, 5, 6, 7] for p in all_of_them)
    assert [p.same_as for p in all_of_them] == ["", "arank-0.3-0", "arank-0.3-0"]
    assert by["random", 0.7, 0].capacities.keys() != by["random", 0.7, 1].capacities.keys()
    assert list(by["fastv", 0.5, 0].capacities) == [2, 3, 4, 5, 6, 7] and by["fastv", 0.5, 1].same_as == "fastv-0.5-0"
    assert by["blind", 0.5, 1].adapt["router"] == {"type": "random", "seed": 1} and not by["blind", 0.5, 1].same_as
    falling = list(by["p_mod", 0.5, 0].capacities.values())
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]
    assert AdaptPoint.read(json.loads(json.dumps(dataclasses.asdict(few)))) == few


def test_a_target_out_of_reach_is_said_to_be(tmp_path: Path) -> None:
    _, points = planned(tmp_path, arms={"arank": ARMS["arank"]}, targets=[0.3, 0.25], seeds=[0])
    assert points[0].flops == pytest.approx(0.3, rel=0.02) and min(points[0].capacities.values()) < 0.1, (
        "less than min_capacity"
    )
    assert re.match(r"6 layers give 0\.26\d of dense FLOPs, not 0\.25 within 2%", points[1].problem)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": [1.5]}, r"targets\[0\]: 1.5: must be less than 1"),
        ({"min_keep": 0.2}, "min_keep is called min_capacity now; write min_capacity: 0.2"),
        ({"base": "/nowhere"}, "base: '/nowhere' is not a folder"),
        (
            {"arms": {"x": {"tokens": "learned", "train": False, "adapt": {"layers": [1]}}}},
            r"arms.x: .*learned routers",
        ),
        ({"arms": {"x": {"train": False}}}, r"arms.x: .*dense control"),
        (
            {"arms": {"x": {"recipe": "a.yaml", "layers": "all", "solve": "centre"}}},
            r"arms.x: .*goes with layers: recipe",
        ),
        ({"arms": {"a/b": {}}}, "arms: .*'a/b'"),
        ({"arms": {"a": {}, "b": {}}}, "one dense control is enough"),
        ({"arms": {"x": {"layer": "arank"}}}, "arms.x.layer: unknown key"),
        ({"test": {"metric": "bleu"}}, "test.metric: 'bleu'"),
    ],
)
def test_bad_sweeps(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(config(tmp_path, **changes)))
    with pytest.raises(ConfigError, match=message):
        open_sweep(path, [])


def test_bad_arms_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"arms.x: .*layers"):
        planned(tmp_path, arms={"x": {"adapt": {"group": "image"}}})
    with pytest.raises(ConfigError, match=r"arms.x: adapt.grou: unknown key"):
        planned(tmp_path, arms={"x": {"adapt": {"grou": "image", "layers": [1]}}})
    bad = parsed(tmp_path, train={"stepps": 3})
    with pytest.raises(ConfigError, match="train.stepps: unknown key"):
        base_recipe(bad)


@pytest.mark.parametrize("name", ["digits", "digit_frames", "photos"])
def test_the_recipes(tmp_path: Path, name: str) -> None:
    sweep = open_sweep(RECIPES.parent / "sweeps" / f"{name}.yaml", [f"base={tmp_path}", f"data={tmp_path}"])
    assert isinstance(sweep, AdaptSweep) and sweep.recipe["data"]["path"] == str(tmp_path)
    with torch.device("meta"):
        model = llava(num_hidden_layers=8)
    groups = (64,) * 4 if name == "digit_frames" else (256,)
    shapes = Counter({(266, groups): 1})
    for point in Planner(sweep.config, model, lambda adapt: shapes, [0.1 * n for n in range(8)]).points():
        assert not point.problem and point.flops == pytest.approx(point.target, rel=0.02)


# --------------------------------------------------------------------------------------------------------- whole sweeps


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_base(folder / "base")
    write_data(folder / "data", validation=12)
    return folder


def test_a_sweep_without_training(folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """One real run; then nothing is left to do, and another sweep is refused the folder."""
    path, out = write_sweep(folders, "blind", arms={"blind": ARMS["blind"]}), folders / "blind"
    arguments = [str(path), str(out), "--no-timing"]
    assert command.main(arguments) == 0
    result = json.loads((out / "runs" / "blind-0.85-0" / "result.json").read_text())
    assert result["after"]["flops"] == pytest.approx(0.85, rel=0.05)
    assert result["after"]["flops"] == pytest.approx(result["point"]["flops"], rel=1e-9), (
        "measured is nominal under top-k"
    )
    assert result["after"]["keys_and_values"] < 1 and result["after"]["questions"] == 8
    text = (out / "results.md").read_text()
    assert (
        f"{100 * result['after']['accuracy']:.1f} % (not tuned)" in text and f"{result['after']['flops']:.3f}" in text
    )
    assert [layer["index"] for layer in json.loads((out / "arank.json").read_text())["layers"]] == [0, 1, 2, 3]
    monkeypatch.setattr(launch, "_start", None)  # a run that is launched fails
    assert command.main(arguments) == 0 and command.main([*arguments, "--report"]) == 0
    assert command.main([*arguments, "tolerance=0.1"]) == 2
    assert "belongs to another sweep" in capsys.readouterr().err


def test_a_sweep_by_perplexity(folders: Path, monkeypatch: Any) -> None:
    """In this process, "tuned" to what the base was: dense, it loses as before, and other pictures change that."""

    def train(folder: Path, recipe: dict[str, Any]) -> float:
        run = Path(recipe["run_dir"])
        shutil.copytree(folders / "base", run / "model")
        (run / "metrics.jsonl").touch()
        return 1.0

    def run(sweep: AdaptSweep, waiting: list[Path], jobs: int, finished: Any) -> list[Path]:
        return [folder for folder in waiting if run_one([sweep.type, str(folder)])]

    monkeypatch.setattr("tools.sweep.adapt.run.train", train)
    monkeypatch.setattr(launch, "launch", run)
    test = {"split": "validation", "samples": 7, "batch": 3, "metric": "perplexity"}
    path, out = (
        write_sweep(folders, "told", arms={name: ARMS[name] for name in ("dense", "blind")}, test=test),
        folders / "told",
    )
    assert command.main([str(path), str(out), "--no-timing"]) == 0
    dense, blind = (
        json.loads((out / "runs" / name / "result.json").read_text()) for name in ("dense-1-0", "blind-0.85-0")
    )
    assert dense["after"] == dense["before"] and dense["after"]["losses"] != dense["exchanged"]["losses"]
    assert dense["after"]["tokens"] == dense["exchanged"]["tokens"] == blind["after"]["tokens"]
    assert blind["after"]["flops"] == pytest.approx(blind["point"]["flops"], rel=1e-9) and "exchanged" not in blind
    text = (out / "results.md").read_text()
    assert f"{math.exp(blind['after']['loss']):.2f} (not tuned)" in text
    assert f"perplexity {math.exp(dense['exchanged']['loss']):.2f}. " in text
    assert command.main([str(path), str(out), "--no-timing", "test.metric=accuracy"]) == 2, (
        "another folder for another metric"
    )


def test_a_metric_that_is_the_default_leaves_no_trace(tmp_path: Path) -> None:
    """A sweep that says it goes on in the folder of one from before metrics could be chosen."""
    silent, said, other = (
        AdaptSweep(parsed(tmp_path, test=test), {}) for test in ({}, {"metric": "accuracy"}, {"metric": "perplexity"})
    )
    check_folder(silent, tmp_path / "out")
    assert "metric" not in json.loads((tmp_path / "out" / "sweep.json").read_text())["test"]
    check_folder(said, tmp_path / "out")
    with pytest.raises(UserError, match="belongs to another sweep"):
        check_folder(other, tmp_path / "out")


def test_data_without_images_are_refused_before_a_run(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folders / "blind_data"
    shutil.copytree(folders / "data", data)
    (data / "validation.jsonl").write_text(json.dumps({"question": "How many sixes?", "answer": "0"}) + "\n")
    path = write_sweep(folders, "no_images", data=str(data), arms={"blind": ARMS["blind"]})
    assert command.main([str(path), str(folders / "no_images"), "--no-timing"]) == 2
    assert re.search(
        r"(test|threshold): no question of '.*blind_data' taken for it has an image", capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_sweep_goes_on(folders: Path) -> None:
    import sys

    arms = {name: ARMS[name] for name in ("dense", "arank", "random", "fastv")}
    train = {
        "steps": 40,
        "global_batch": 2,
        "micro_batch": 2,
        "device": "cpu",
        "evaluate_every": 0,
        "checkpoint_every": 1,
        "log_every": 1,
    }
    path, out = write_sweep(folders, "killed", arms=arms, train=train, jobs=2), folders / "killed"
    arguments = [sys.executable, "-m", "tools.sweep", str(path), str(out)]
    first = Processes.of_commands([(arguments, environment())], folders / "first")
    checkpoint = out / "runs" / "dense-1-0" / "run" / "checkpoints" / "step-2"
    assert first.wait_until(checkpoint.exists), first.printed()
    os.kill(first.members[0].pid, signal.SIGKILL)
    first.members[0].wait()
    again = Processes.of_commands([(arguments, environment())], folders / "again")
    assert again.wait(500) == [0], again.printed()
    results = {file.parent.name: json.loads(file.read_text()) for file in out.glob("runs/*/result.json")}
    assert {"dense-1-0", "arank-0.85-0", "fastv-0.85-0"} <= set(results)
    steps = [json.loads(line) for line in (out / "runs" / "dense-1-0" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 41))
    for name, result in results.items():
        assert result["after"]["flops"] == pytest.approx(result["point"]["target"], rel=0.05), name
        assert not (out / "runs" / name / "run").exists()
        assert ("threshold" in result) == name.startswith(("arank", "random"))
    times = json.loads((out / "timing.json").read_text())
    assert times["arank-0.85"]["prefill"]["rounds"] >= 3 and times["arank-0.85"]["decode"]["ms"] > 0
    text = (out / "results.md").read_text()
    assert f"{100 * results['dense-1-0']['after']['accuracy']:.1f} %" in text and "Not finished yet" not in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_failed_run_leaves_the_others_alone(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"arank": ARMS["arank"], "blind": ARMS["blind"]}
    path, out = write_sweep(folders, "failed", arms=arms), folders / "failed"
    assert command.main([str(path), str(out), "--report"]) == 0
    (out / "runs" / "arank-0.85-0" / "run").write_text("in the way of the run's folder")
    assert command.main([str(path), str(out)]) == 1
    assert "arank-0.85-0 failed:" in capsys.readouterr().err
    assert (out / "runs" / "blind-0.85-0" / "result.json").exists()
    assert "Not finished yet: arank-0.85-0." in (out / "results.md").read_text()
