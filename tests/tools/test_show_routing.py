"""`python -m tools.show_routing`: a picture for each image, the share that layers skip, and what cannot be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import zoo.adapt as za
from tests.pretrain.finetune.processors import LLAVA_TEMPLATE, llava_processor, write_questions
from tests.zoo.adapt.families import llava, qwen_vl
from tools.show_routing import main

LINES = [
    {"image": "0.png", "question": "how many $?", "answer": "two"},
    {"images": ["1.png", "2.png"], "question": "are they equal?", "answer": "no"},
]
ROUTED = {"layers": [1, 2], "capacity": {"type": "list", "values": [0.5, 0.25]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapted")
    za.save_adapted(za.adapt(llava(), ROUTED), folder)
    llava_processor(LLAVA_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "data", LINES, "validation")


def call(*arguments: Any) -> int:
    return main([*map(str, arguments), "--device", "cpu"])


def test_a_picture_for_each_image(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found"
    assert call(model, data, "--out", out) == 0
    names = sorted(path.name for path in out.iterdir())
    assert len(names) == 4 and names[-1] == "skip_ratio.png" and sum("image_1" in name for name in names) == 1
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.format == "PNG" and picture.width > 300
    printed = capsys.readouterr().out
    assert "layer   0  dense\nlayer   1  skips  50.0%\nlayer   2  skips  75.0%\nlayer   3  dense" in printed


def test_bad_input(model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, other, bare, out = (tmp_path / name for name in ("dense", "other", "bare", "out"))
    llava().save_pretrained(dense)
    qwen = qwen_vl("Qwen2VL", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2})()
    za.save_adapted(za.adapt(qwen, ROUTED), other)
    llava_processor(LLAVA_TEMPLATE).save_pretrained(other)
    za.save_adapted(za.adapt(llava(), ROUTED), bare)
    for arguments, message in [
        ((dense, data), "no mod_config.json in it"),
        ((other, data), "image tokens of qwen2_vl are not one square grid"),
        ((bare, data), "cannot be opened as an adapted model with a processor"),
        ((model, tmp_path / "none"), "does not exist"),
        ((model, data, "--split", "test"), "test.jsonl: does not exist"),
        ((model, data, "--samples", 0), "--samples 0: must be at least 1"),
    ]:
        assert call(*arguments, "--out", out) == 2, message
        assert message in capsys.readouterr().err
    assert not out.exists()
