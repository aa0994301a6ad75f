"""What a sweep over pretrainings expands to, and what it refuses before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pretrain import recipe as recipes
from pretrain.describe import blueprint, describe
from tests.pretrain.runs import EXPERTS, LAYER
from tests.tools.sweep.pretrain.sweeps import MOMA, config, write_sweep
from tools.sweep import __main__ as command
from tools.sweep.kinds import open_sweep
from tools.sweep.pretrain.plan import Facts, plan, stages
from tools.sweep.pretrain.settings import SweepConfig, parse
from zoo.config import ConfigError

READY = Path(__file__).parents[4] / "recipes" / "sweeps"
SWEEPS = [path for path in sorted(READY.glob("*.yaml")) if "type: adapt" not in path.read_text()]


def parsed(folder: Path, **changes: Any) -> SweepConfig:
    return parse({k: v for k, v in config(folder, "data", **changes).items() if k != "type"}, folder)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_ready_sweeps_match_or_say_why(path: Path) -> None:
    """Every arm of every size resolves, and matches as its file says; the header's count of runs is right."""
    sweep = open_sweep(path, [])
    points = sweep.plan(Path("unused"))
    said = re.search(r"(\d+) runs", path.read_text())
    assert said is None or int(said[1]) == len({point.same_as or point.name for point in points})
    assert "Must match" in sweep.preview(points)


def test_points_and_their_recipes(tmp_path: Path) -> None:
    """Base, sweep, arm, size, arm at the size: the later has the last word."""
    sweep = parsed(
        tmp_path,
        over={"optimizer": {"lr": 1e-3}},
        seeds=[3, 5],
        sizes={"small": {}, "large": {"model": {"layers": {"feedforward": {"d_ff": 64}}}}},
        arms={
            "dense": {},
            "moma": {"over": MOMA, "sizes": {"large": {"optimizer": {"lr": 2e-3}}}},
            "again": {"over": MOMA, "sizes": {"large": {"optimizer": {"lr": 2e-3}}}},
        },
    )
    points = plan(sweep)
    assert [point.name for point in points[:4]] == ["dense-small-3", "moma-small-3", "again-small-3", "dense-small-5"]
    assert [point.size for point in points] == ["small"] * 6 + ["large"] * 6, "a size is finished before the next"
    assert [point.same_as for point in points[2::3]] == [point.name for point in points[1::3]], "the very same runs"
    (stage,) = stages(sweep, "moma", "large")
    recipe = recipes.resolve(stage.recipe)
    assert recipe.optimizer.lr == 2e-3 and recipe.model.layers[0].feedforward.d_ff == 64
    assert recipes.resolve(stages(sweep, "dense", "small")[0].recipe).optimizer.lr == 1e-3
    assert recipe.run_dir is None and recipe.name == "moma-large"


def test_facts_leave_routers_out(tmp_path: Path) -> None:
    sweep = parsed(tmp_path)
    points = {point.arm: point.facts for point in plan(sweep)}
    assert points["dense"].flops == points["moma"].flops and points["dense"].active == points["moma"].active
    assert points["dense"].routers == (0, 0) != points["moma"].routers
    recipe = recipes.resolve(stages(sweep, "dense", "one")[0].recipe)
    told = describe(recipe, blueprint(recipe), 1)
    assert told["flops_per_token"] == dict(zip(("text", "image"), Facts.of(recipe).flops, strict=True))
    assert told["parameters"]["total"] == Facts.of(recipe).total, "of a dense model"


def test_unmatched_arms_are_refused_with_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {"model": {"layers": {"feedforward": EXPERTS | {"d_ff": 48}}}}
    path = write_sweep(
        tmp_path, "data", arms={"dense": {}, "moma": {"over": wide}}, match={"flops": 0.01, "active": 0.3}
    )
    out = tmp_path / "out"
    assert command.main([str(path), str(out)]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"arms\.moma at size one: flops \(text\) \+\d+\.\d% of dense's, and match\.flops allows 1\.0%", said
    )
    assert "arms.moma.unmatched.flops why" in said and "match.active" not in said and said.count("error:") == 1
    assert re.search(r"\| moma \| one \| [\d.]+k \| \+\d+\.\d% \|", said), "the table"
    assert not (out / "runs").exists()


def test_an_arm_may_say_why_it_does_not_match(tmp_path: Path) -> None:
    wide = {"model": {"layers": {"feedforward": EXPERTS | {"d_ff": 48}}}}
    sweep = parsed(tmp_path, arms={"dense": {}, "moma": {"over": wide, "unmatched": {"flops": "wider on purpose"}}})
    points = plan(sweep)
    from tools.sweep.pretrain.sweep import PretrainSweep

    assert "- moma, flops: wider on purpose" in PretrainSweep(sweep).preview(points)


def test_equal_flops_of_the_whole_training(tmp_path: Path) -> None:
    """A model with half of every second layer takes more steps, the last of them within half a step of the budget."""
    layer = {**LAYER, "feedforward": {"type": "dense", "d_ff": 32}}
    mod = {"model": {"layers": [{**layer, "depth": {"type": "mod", "capacity": 0.5}}]}}
    sweep = parsed(
        tmp_path,
        steps="flops",
        over={"train": {"steps": 400}},
        match={"flops": 0.005},
        arms={"dense": {}, "mod": {"over": mod}},
    )
    dense, routed = (point.facts for point in plan(sweep))
    assert dense.steps == 400 < routed.steps
    assert routed.steps * sum(routed.flops) == pytest.approx(400 * sum(dense.flops), rel=0.5 / 400)


def test_upcycling_shares_the_steps(tmp_path: Path) -> None:
    one = {"model": {"layers": {"feedforward": {"experts": {"text": 1, "image": 1}}}}}
    arm = {"over": MOMA, "begin": {"share": 0.25, "over": one}}
    sweep = parsed(tmp_path, arms={"dense": {}, "up": arm}, over={"train": {"steps": 40}})
    first, second = stages(sweep, "up", "one")
    assert (first.kind, second.kind) == ("train", "upcycle")
    assert (first.recipe["train"]["steps"], second.recipe["train"]["steps"]) == (10, 30)
    assert recipes.resolve(first.recipe).model.layers[0].feedforward.experts == {"text": 1, "image": 1}
    assert plan(sweep)[1].facts.steps == 40


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"arms": {"dense": {}, "x": {"over": {"train": {"global_batch": 8}}}}},
            "no pairs .train.global_batch: 4 there, 8",
        ),
        (
            {"arms": {"dense": {}, "x": {"over": {"data": {"sequence_length": 96}}}}},
            r"72 there, 96 here.*vary: \[data\]",
        ),
        (
            {"arms": {"dense": {}, "x": {"over": {"model": {"d_modle": 8}}}}},
            "arms.x at size one: model.d_modle: unknown key",
        ),
        ({"over": {"train": {"evaluate_every": 0}}}, "train.evaluate_every: 0; savings are read off curves"),
        ({"match": {}}, "match: says nothing|says nothing; give flops"),
        ({"match": {"flops": 0.1, "like": "denes"}}, "match.like 'denes' is no arm.*did you mean 'dense'"),
        ({"compare": {"moma": "dens"}}, "compare.moma 'dens' is no arm; give one of dense, moma .did you mean 'dense'"),
        ({"compare": {"mama": "dense"}}, "compare 'mama' is no arm"),
        ({"baseline": "none"}, "baseline 'none' is no arm; give one of dense, moma"),
        ({"seeds": [1, 1]}, "names a seed twice"),
        ({"arms": {"a-b": {}}}, "a name must be letters"),
        ({"arms": {"dense": {"sizes": {"big": {}}}}}, "arms.dense.sizes.big is no size; give one of one"),
        ({"arms": {"dense": {"unmatched": {"total": "so"}}}}, "match.total asks for nothing"),
        ({"recipe": "nowhere.yaml"}, "recipe: 'nowhere.yaml' is not a file beside the sweep's"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(parsed(tmp_path, **changes))


def test_arms_may_vary_their_data_where_that_is_compared(tmp_path: Path) -> None:
    arms = {"dense": {}, "x": {"over": {"data": {"sequence_length": 96}}}}
    assert len(plan(parsed(tmp_path, arms=arms, vary=["data"], match={"flops": 0.2}))) == 2
