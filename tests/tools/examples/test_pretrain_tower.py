"""`python -m tools.examples.pretrain_tower`: the tower learns digits, in place, and the rest of the model stays as it
is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from tools.examples import make_digit_grids, make_llava, pretrain_tower
from tools.examples.make_llava import LlavaFolderConfig

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch": 4,
    "vision": {"d_model": 24, "layers": 1, "heads": 2, "d_ff": 48},
    "decoder": {"d_model": 16, "layers": 1, "heads": 2, "d_ff": 16, "positions": 64},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grids")
    sizes = ["--rows", "2", "--columns", "2", "--scale", "1"]
    assert make_digit_grids.main([str(folder), *sizes, "--train", "400", "--validation", "40", "--test", "1"]) == 0
    return folder


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Path:
    make_llava.write(LlavaFolderConfig.parse(SIZES), data, tmp_path / "model")
    return tmp_path / "model"


def test_targets_are_the_cells() -> None:
    wanted = pretrain_tower.targets(np.array([[[3, -1], [0, 9]]]), 4)
    assert wanted["digit"].reshape(4, 4).tolist() == [[4, 4, 0, 0], [4, 4, 0, 0], [1, 1, 10, 10], [1, 1, 10, 10]]
    assert wanted["row"].reshape(4, 4).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]
    assert torch.equal(wanted["column"].reshape(4, 4), wanted["row"].reshape(4, 4).T)


def test_the_tower_learns_and_nothing_else_changes(folder: Path, data: Path, capsys: Any) -> None:
    before = LlavaForConditionalGeneration.from_pretrained(folder)
    assert pretrain_tower.main([str(folder), str(data), "--steps", "150", "--batch", "16", "--lr", "5e-3"]) == 0
    right = float(capsys.readouterr().out.split("reads ")[1].split("%")[0])
    assert right > 40  # of ten digits
    after = LlavaForConditionalGeneration.from_pretrained(folder)
    for name, weight in before.named_parameters():
        same = torch.equal(weight, after.get_parameter(name))
        assert same != ("vision_tower" in name and "post_layernorm" not in name), name
    assert AutoProcessor.from_pretrained(folder).tokenizer.eos_token == "</s>"


def test_bad_input(folder: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    assert pretrain_tower.main([str(tmp_path), str(data)]) == 2
    assert "holds no model" in capsys.readouterr().err
    plain = tmp_path / "plain"
    plain.mkdir()
    line = json.loads((data / "train.jsonl").read_text().splitlines()[0])
    shutil.copy(data / line["image"], plain / "picture.png")
    line["image"] = "picture.png"
    for cells, message in ((None, "has no 'cells'"), ([[1] * 3] * 3, "do not divide the 4 patches")):
        (plain / "train.jsonl").write_text(
            json.dumps({**line, "cells": cells} if cells else {"image": line["image"], "question": "?", "answer": "a"})
        )
        assert pretrain_tower.main([str(folder), str(plain)]) == 2
        assert message in capsys.readouterr().err
