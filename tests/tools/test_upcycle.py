"""`python -m tools.upcycle`: a finished run becomes the start of a larger one; data go on, the schedule begins anew."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

from pretrain import metrics, run_folder
from tests.pretrain.runs import LAYER, start, tiny_recipe, write_recipe
from tools.upcycle import main


def layers(text: int, image: int) -> list[dict]:
    layer = copy.deepcopy(LAYER)
    layer["feedforward"] = {"type": "moma", "experts": {"text": text, "image": image}, "d_ff": 32}
    return [layer, layer]


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
    assert "data go on at row 16" in printed
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
