"""`python -m tools.upcycle`: a finished run becomes the start of a larger one; data go on, the schedule begins anew."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from pretrain import metrics, run_folder
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.runs import LAYER, start, tiny_recipe, write_recipe
from tools.examples import make_digits
from tools.upcycle import main


def layers(text: int, image: int) -> list[dict]:
    layer = copy.deepcopy(LAYER)
    layer["feedforward"] = {"type": "moma", "experts": {"text": text, "image": image}, "d_ff": 32}
    return [layer, layer]


def run(folder: Path, data: Path, name: str, model_layers: list[dict], **changes: Any) -> Path:
    """A recipe file `name` whose run folder has the same name."""
    model = {**tiny_recipe(data, folder)["model"], "layers": model_layers}
    return write_recipe(
        folder / f"{name}_recipe", data, folder / name, **{"model": model, "train": {"steps": 1}, **changes}
    )


def test_a_seed_run_grows(digit_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_recipe(digit_shards, tmp_path)["model"]
    seed = write_recipe(
        tmp_path / "a", digit_shards, tmp_path / "seed", model={**model, "layers": layers(1, 1)}, train={"steps": 4}
    )
    grown = write_recipe(
        tmp_path / "b", digit_shards, tmp_path / "grown", model={**model, "layers": layers(2, 2)}, train={"steps": 2}
    )
    assert main([str(tmp_path / "seed"), str(grown)]) == 2
    assert "recipe.yaml: does not exist; give the folder of a run" in capsys.readouterr().err

    assert start([seed], tmp_path / "printed").wait() == [0]
    assert main([str(tmp_path / "seed"), str(grown)]) == 0
    printed = capsys.readouterr().out
    assert f"data go on at row 16. Start it: python -m pretrain.train {grown}\n" in printed
    before, after = re.search(r"^eval/topk/loss: (\S+) → (\S+)$", printed, re.MULTILINE).groups()
    ended = [item for item in metrics.read(tmp_path / "seed" / "metrics.jsonl") if "eval/topk/loss" in item][-1]
    assert float(before) == pytest.approx(ended["eval/topk/loss"], abs=1e-4) and before != after
    initial = run_folder.load_initial(tmp_path / "grown")
    old, _ = run_folder.load_model(tmp_path / "seed")
    name = "layers.0.feedforward.groups.text.experts.w_in"
    grown_weight = initial.weights[name]
    assert grown_weight.shape[0] == 2 and all(copy.equal(old.state_dict()[name][0]) for copy in grown_weight)

    processes = start([grown], tmp_path / "printed")
    assert processes.wait() == [0], processes.printed()
    first, second = (item for item in metrics.read(tmp_path / "grown" / "metrics.jsonl") if "loss" in item)
    seed_steps = [item for item in metrics.read(tmp_path / "seed" / "metrics.jsonl") if "loss" in item]
    assert (first["step"], second["step"]) == (1, 2), "the schedule begins anew"
    assert first["loss"] < seed_steps[0]["loss"], "it does not start from its seed"
    state = json.loads((tmp_path / "grown" / "checkpoints" / "step-2" / "trainer.json").read_text())
    assert state["first_row"] == 16 == initial.position.row, "the data go on"
    assert main([str(tmp_path / "seed"), str(grown)]) == 2
    assert "is a run that has begun" in capsys.readouterr().err


def test_the_command_that_is_printed_has_the_overrides(
    digit_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs as it stands: another folder, and a name that needs quotes."""
    seed = run(tmp_path, digit_shards, "seed", layers(1, 1))
    assert start([seed], tmp_path / "printed", ranks=1).wait() == [0]
    capsys.readouterr()
    grown, overrides = run(tmp_path, digit_shards, "grown", layers(2, 2)), [f"run_dir={tmp_path / 'a b'}", "seed=3"]
    assert main([str(tmp_path / "seed"), str(grown), *overrides, "--rows", "0"]) == 0
    printed = capsys.readouterr().out.strip().partition("Start it: ")[2]
    assert shlex.split(printed) == ["python", "-m", "pretrain.train", str(grown), *overrides]
    assert run_folder.load_initial(tmp_path / "a b") is not None and not (tmp_path / "grown").exists()


def test_other_tokenizers_of_equal_size_are_refused(
    digit_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data with tokenizers of their own are; with those of the seed's data they are taken, and begin at row 0."""
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "val"):
        documents = [sample(f"{n:03d}", make_digits.NAMES[n % 10], png(n)) for n in range(60)]
        write_shard(other / f"digits-{split}-000.tar", documents)
    seed = run(tmp_path, digit_shards, "seed", layers(1, 1))
    assert start([seed], tmp_path / "printed", ranks=1).wait() == [0]
    grown = run(tmp_path, other, "grown", layers(2, 2))
    command = [str(tmp_path / "seed"), str(grown), "--rows", "0"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "error: modalities: image: ids mean something else than in" in error and not (tmp_path / "grown").exists()

    own = re.search(r"use the run's own: (modalities.image.path=\S+)$", error, re.MULTILINE)
    assert own and main([*command, own[1]]) == 0
    initial = run_folder.load_initial(tmp_path / "grown")
    assert initial is not None and initial.position.data == run_folder.position(tmp_path / "seed").data
    assert "data begin at row 0" in capsys.readouterr().out

    again = run(tmp_path, other, "again", layers(2, 2))
    (tmp_path / "seed" / "modalities" / "about.json").unlink()
    assert main([str(tmp_path / "seed"), str(again), "--rows", "0"]) == 2
    assert "without it nobody knows what the run's ids mean" in capsys.readouterr().err
