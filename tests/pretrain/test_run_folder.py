"""The run folder: one owner at a time, one recipe, and a model that can be loaded."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from tests.pretrain.runs import EXPERTS, LAYER, tiny_recipe
from zoo.config import UserError


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    lock = run_folder.claim(tmp_path / "run")
    with pytest.raises(UserError, match="is in use by a live run"):
        run_folder.claim(tmp_path / "run")
    lock.close()
    run_folder.claim(tmp_path / "run").close()


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    """Killed, not stopped: nothing has to be removed by hand."""
    hold = "import fcntl, os, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", hold, str(tmp_path / ".lock")]).returncode == -9
    run_folder.claim(tmp_path).close()


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    for name in ("model.safetensors.12.writing", "notes.tmp", "model.safetensors"):
        (tmp_path / name).write_text("")
    (tmp_path / "model.12.writing").mkdir()
    run_folder.claim(tmp_path).close()
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.tmp", "model.safetensors"}


def test_recipe_and_model_go_in_and_come_out(tmp_path: Path) -> None:
    recipe = recipes.resolve(tiny_recipe("data", tmp_path / "run"))
    (tmp_path / "run").mkdir()
    run_folder.check_recipe(tmp_path / "run", recipe)
    run_folder.write_recipe(tmp_path / "run", recipe, {"train_batch_size": 4})
    run_folder.check_recipe(tmp_path / "run", recipe)
    with pytest.raises(UserError, match=r"model.safetensors: does not exist; it is written when the run ends"):
        run_folder.load_model(tmp_path / "run")

    model = zoo.build("model", recipe.model, seed=3)
    run_folder.save_model(tmp_path / "run", model.state_dict())
    loaded, same = run_folder.load_model(tmp_path / "run")
    assert same == recipe and not loaded.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    names = {"recipe.yaml", "deepspeed.json", "environment.json", "model.safetensors"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names, "no temporary file stays"


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe.yaml: does not exist; give the folder of a run"):
        run_folder.load_model(tmp_path)


def test_every_difference_is_named(tmp_path: Path) -> None:
    old = recipes.resolve(tiny_recipe("data", tmp_path))
    run_folder.write_recipe(tmp_path, old, {})
    changes: dict[str, Any] = {"seed": 4, "optimizer": {"eps": 1e-6}, "train": {"steps": 5, "micro_batch": 1}}
    with pytest.raises(UserError) as caught:
        run_folder.check_recipe(tmp_path, recipes.resolve(tiny_recipe("data", tmp_path, **changes)))
    assert str(caught.value).splitlines()[1:] == [
        "  optimizer.eps: 1e-08 there, 1e-06 here",
        "  seed: 0 there, 4 here",
        "  train.micro_batch: 2 there, 1 here",
    ]


def test_a_key_that_is_younger_than_the_run_has_its_default(tmp_path: Path) -> None:
    """Keys that the user has not written may be absent from the recorded recipe; one that says otherwise may not."""
    written = tiny_recipe("data", tmp_path)
    recipe = recipes.resolve(written)
    run_folder.write_recipe(tmp_path, recipe, {})
    recorded = recipe.dump()
    # a block's type says what its other keys are, and two keys of the model follow from other sections
    apart = (("model", "modalities"), ("model", "vocab_size"))
    defaults = [
        path for path in leaves(recorded) if not has(written, path) and path[-1] != "type" and path not in apart
    ]
    assert ("data", "workers") in defaults and ("model", "layers", 0, "mixer", "qk_norm") in defaults

    def without(*paths: tuple[str | int, ...]) -> None:
        old = copy.deepcopy(recorded)
        for path in paths:
            section: Any = old
            for key in path[:-1]:
                section = section[key]
            del section[path[-1]]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(old))
        run_folder.check_recipe(tmp_path, recipe)
        assert run_folder.changes(tmp_path, recipe, 12) == []

    for section in {path[0] for path in defaults}:
        without(*(path for path in defaults if path[0] == section))
    for path in (("objective", "z_loss"), ("schedule", "type"), ("model", "d_model")):
        with pytest.raises(UserError, match=rf"{path[0]}.{path[1]}: "):
            without(path)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths to all keys of a recipe that hold no section."""
    if isinstance(value, dict) and value:
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [leaf for number, item in enumerate(value) for leaf in leaves(item, (*path, number))]
    return [path]


def has(value: Any, path: tuple[str | int, ...]) -> bool:
    """Whether a recipe names this key."""
    for key in path:
        if not (key in value if isinstance(value, dict) else isinstance(value, list) and key < len(value)):
            return False
        value = value[key]
    return True


def test_what_may_change_and_matters_is_said(tmp_path: Path) -> None:
    cosine = {"schedule": {"type": "cosine", "decay_steps": None}}
    old = recipes.resolve(tiny_recipe("data", tmp_path, **cosine))
    run_folder.write_recipe(tmp_path, old, {})
    assert run_folder.changes(tmp_path, old, 12) == []
    changes: dict[str, Any] = {"optimizer": {"lr": 1e-3}, "train": {"steps": 24, "clip": 0.5, "log_every": 3}}
    new = recipes.resolve(tiny_recipe("data", tmp_path, **cosine, **changes))
    run_folder.check_recipe(tmp_path, new)
    assert run_folder.changes(tmp_path, new, 12) == [
        "from step 13 on: optimizer.lr: 0.01 there, 0.001 here",
        "from step 13 on: train.clip: 1.0 there, 0.5 here",
        "from step 13 on: train.steps: 12 there, 24 here: the learning rate goes on at 55.0% of its peak, where 10.0% "
        "was planned",
    ]
    (tmp_path / "recipe.yaml").unlink()
    assert (
        "recipe.yaml is gone; that the checkpoint is of this recipe cannot be told"
        in run_folder.changes(tmp_path, new, 12)[0]
    )


@pytest.mark.parametrize(("scope", "allowed"), [("row", True), ("microbatch", False)])
def test_the_micro_batch_may_change_where_rows_are_computed_by_themselves(
    tmp_path: Path, scope: str, allowed: bool
) -> None:
    layers = [{**LAYER, "feedforward": EXPERTS | {"scope": scope}}]
    changes: dict[str, Any] = {"model": {"layers": [*layers, {**LAYER, "feedforward": {"type": "dense", "d_ff": 32}}]}}
    old = recipes.resolve(tiny_recipe("data", tmp_path, **changes))
    run_folder.write_recipe(tmp_path, old, {})
    new = recipes.resolve(tiny_recipe("data", tmp_path, train={"micro_batch": 1}, **changes))
    line = "train.micro_batch: 2 there, 1 here"
    assert run_folder.changes(tmp_path, new, 12) == [f"from step 13 on: {line}"]
    if allowed:
        run_folder.check_recipe(tmp_path, new)
    else:
        with pytest.raises(UserError, match=line):
            run_folder.check_recipe(tmp_path, new)


def test_a_recipe_with_umlauts_stays_readable(tmp_path: Path) -> None:
    recipe = recipes.resolve(tiny_recipe("Dätä", tmp_path))
    run_folder.write_recipe(tmp_path, recipe, {})
    assert "Dätä" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8")) == recipe.dump()
