"""A run folder that someone else has written: whatever stands in it, opening it runs no code and harms no file."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain import recipe as recipes
from pretrain import recipe_file, run_folder
from pretrain.checkpoint import CheckpointStore
from pretrain.manifest import MANIFEST, read_manifest, write_manifest
from pretrain.second_stage import second_stage
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import tiny_recipe, write_recipe
from tests.pretrain.test_checkpoint import OneRank
from zoo.config import ConfigError, UserError
from zoo.files import checksum
from zoo.kept import keep_modalities
from zoo.modalities import parse_modalities

MODULE = "import pathlib; pathlib.Path({marker!r}).touch()"


class Payload:
    """Runs when it is unpickled: makes the folder `marker`."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def poison(run: Path, marker: Path) -> None:
    """Put a payload into every file of tensors, and modules with the names of libraries beside them."""
    for step in (run / "checkpoints").glob("step-*"):
        for file in step.rglob("*.pt"):
            torch.save({"module": Payload(str(marker)), "optimizer_state_dict": Payload(str(marker))}, file)
        names = [name for name in read_manifest(step).files if name != MANIFEST]
        about = read_manifest(step).about
        write_manifest(step, about, {name: checksum(step / name) for name in names})
    for name in ("torch", "deepspeed", "pretrain", "yaml", "evil_module"):
        for folder in (run, run / "checkpoints"):
            (folder / f"{name}.py").write_text(MODULE.format(marker=str(marker)))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "imports": ["evil_module"]}, sort_keys=False))


def openings(data: Path, folder: Path) -> dict[str, tuple[Any, str]]:
    """What every command that opens a run makes of a poisoned one: its exit code or exception, and what it said."""
    import pretrain.train
    from pretrain import universal
    from tests.pretrain.runs import one_rendezvous
    from tools import check, train_routers, upcycle
    from tools.describe import __main__ as described
    from tools.examples import evaluate_digits

    run, marker, results = folder / "run", folder / "marker", {}
    mine = write_recipe(folder / "mine", data, run, train={"steps": 2})
    grown = write_recipe(folder / "grown", data, folder / "grown_run", train={"steps": 2})

    def note(name: str, work: Callable[[], Any]) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                outcome = work()
            except (UserError, OSError) as error:
                outcome = type(error).__name__
                print(error)
        assert not marker.exists(), f"{name} ran code"
        results[name] = (outcome, said.getvalue())

    with one_rendezvous():
        note("train", lambda: pretrain.train.main([str(mine)]))
        shutil.copytree(run, folder / "whole")
        poison(run, marker)
        theirs = str(run / "recipe.yaml")
        checkpoint = run / "checkpoints" / "step-2"
        note("check", lambda: check.main([theirs]))
        note("describe", lambda: described.main([theirs]))
        note("evaluate", lambda: evaluate_digits.main([theirs]))
        note("train theirs", lambda: pretrain.train.main([theirs]))
        note("routers", lambda: train_routers.main([str(run)]))
        note("upcycle", lambda: upcycle.main([str(run), str(grown)]))
        note("model", lambda: run_folder.load_model(run))
        note("weights", lambda: run_folder.newest_weights(run))
        note("convert", lambda: universal.convert(checkpoint))
        shutil.copy(folder / "whole" / "recipe.yaml", theirs)  # resuming compares; nothing differs any more
        note("resume", lambda: pretrain.train.main([str(mine), "train.steps=3"]))
        note("routers without imports", lambda: train_routers.main([str(run)]))
    return results


@pytest.fixture(scope="module")
def opened(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("received")
    target = "tests.pretrain.test_received_run:openings"
    return run_ranks(target, 1, folder / "scratch", 200, data=digit_shards, folder=folder)[0]


def test_tensors_that_are_code(opened: dict[str, tuple[Any, str]]) -> None:
    assert opened["train"][0] == 0, opened["train"]
    refused = "a file of tensors names posix.mkdir, which could run code; nothing of it was run"
    for name in ("resume", "routers without imports"):
        code, said = opened[name]
        assert code == 2 and refused in said and "Traceback" not in said, (name, said)
    assert opened["weights"][0] == "UserError" and refused in opened["weights"][1]
    assert opened["convert"][0] == "OSError" and refused in opened["convert"][1]


@pytest.mark.parametrize("name", ["check", "describe", "evaluate", "train theirs", "routers", "upcycle", "model"])
def test_imports_of_a_run_folder(opened: dict[str, tuple[Any, str]], name: str) -> None:
    outcome, said = opened[name]
    assert outcome == ("ConfigError" if name == "model" else 2), said
    assert "imports: ['evil_module'] stands in the recipe of a run folder, which runs no code of itself" in said
    assert "if you trust these modules, name them: 'imports=[evil_module]'" in said


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose recipe imports a module that makes `marker`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made_by_hand.py").write_text(MODULE.format(marker=str(tmp_path / "marker")))
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe("data", run, imports=["made_by_hand"])))
    yield run
    sys.modules.pop("made_by_hand", None)


def test_what_the_user_names_runs(run: Path) -> None:
    with pytest.raises(ConfigError, match="runs no code of itself"):
        recipes.load(run / "recipe.yaml")
    marker = run.with_name("marker")
    assert not marker.exists() and recipe_file.read(run / "recipe.yaml")["imports"] == ["made_by_hand"]
    recipe = recipes.load(run / "recipe.yaml", ["imports=[made_by_hand]"])
    assert marker.exists() and recipe.imports == ["made_by_hand"]
    assert recipes.load(run / "recipe.yaml") == recipe, "what has been imported may be named by anyone"


def test_routers_of_a_run_whose_modules_are_named(run: Path) -> None:
    engine: Any = OneRank()
    CheckpointStore(run / "checkpoints", keep=1).save(engine, 1, {})
    keep_modalities(run, {"text": parse_modalities({"text": {"type": "bytes"}})["text"].open()})
    with pytest.raises(ConfigError, match="runs no code of itself"):
        second_stage(run)
    assert second_stage(run, ["imports=[made_by_hand]"]).imports == ["made_by_hand"]


def test_extending_is_no_way_around(run: Path) -> None:
    """Neither from a run's recipe to another file, nor from one's own recipe to that of a run."""
    theirs = run / "recipe.yaml"
    (run / "more").mkdir()
    theirs.rename(run / "more" / "other.yaml")
    theirs.write_text("extends: more/other.yaml\n")
    own = run.with_name("own.yaml")
    own.write_text("extends: run/recipe.yaml\n")
    for path in (theirs, own):
        with pytest.raises(ConfigError, match="runs no code of itself"):
            recipes.load(path)
    assert not run.with_name("marker").exists()
    own.write_text("extends: run/recipe.yaml\nimports: [made_by_hand]\n")
    recipes.load(own)
    assert run.with_name("marker").exists()


def test_links_lead_nowhere(run: Path) -> None:
    """A lock or a list of unreadable lines that is a link to a file of the user's."""
    from pretrain import metrics

    precious = run.with_name("precious")
    precious.write_text("kept")
    (run / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="cannot be written"):
        run_folder.claim(run)
    (run / metrics.UNREADABLE).symlink_to(precious)
    (run / "metrics.jsonl").write_text("rm -rf ~\n")
    with pytest.raises(UserError, match=r"metrics.unreadable: cannot be written .*; remove it, and resume"):
        metrics.cut(run / "metrics.jsonl", 3)
    assert precious.read_text() == "kept"
