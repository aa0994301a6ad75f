"""`python -m tools.show_routing`: kept and skipped patches of a tiny adapted LLaVA, and what cannot be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zoo.adapt as za
from pretrain.data.prompts import encode
from pretrain.data.questions import read_questions
from tests.pretrain.data.processors import LLAVA_TEMPLATE, llava_processor, write_questions
from tests.zoo.adapt.families import llava, qwen_vl
from tools import show_routing
from tools.show_routing import main
from zoo.adapt.family import IMAGE, picture_ids

LINES = [
    {"image": "0.png", "question": "how many $?", "answer": "two"},
    {"images": ["1.png", "2.png"], "question": "are they equal?", "answer": "no"},
]
ROUTED = {"layers": [1, 2], "capacity": {"type": "list", "keep": [0.5, 0.25]}}


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


def test_what_is_drawn_is_what_was_decided(model: Path, data: Path) -> None:
    adapted, processor = show_routing.open_adapted(model, None, "cpu")
    question = read_questions(data, "validation")[1]
    pictures, load = show_routing.looked_at(adapted, processor, question)
    inputs, trace = encode(question, processor, answers=False), za.Trace()
    with torch.no_grad():
        adapted(**inputs, mod_trace=trace)
    (image,) = [token for token, kind in picture_ids(adapted.config, "").items() if kind == IMAGE]
    places = (inputs["input_ids"][0] == image).nonzero()[:, 0]
    for layer in (1, 2):
        keep = trace.decisions[f"layers.{layer}"].keep[0]
        drawn = np.concatenate([picture.kept[layer].reshape(-1) for picture in pictures])
        assert drawn.tolist() == keep[places].tolist() and pictures[0].kept[layer].shape == (4, 4)
    assert load.tolist() == [[0, 0], [16, 32], [8, 32], [0, 0]]
    with Image.open(question.images[1]) as image:
        values = np.asarray(image.convert("RGB")) / 255
    assert np.abs(pictures[1].image - values).max() < 1e-5, "normalisation is undone"


def test_skipped_patches_are_dark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))
    kept = np.array([[True, False], [False, False]])
    picture = show_routing.Picture(np.ones((8, 8, 3)), {3: kept, 5: ~kept}, "which?")
    show_routing.draw(picture, tmp_path / "x.png")
    image, first, second = [axis for axis in figures[0].axes if axis.images]
    assert [axis.get_title() for axis in (image, first, second)] == [
        "image", "layer 3: 1 of 4 kept", "layer 5: 3 of 4 kept",
    ]  # fmt: skip
    assert (np.asarray(first.images[1].get_array())[..., 3] > 0).tolist() == (~kept).tolist()
    assert first.images[1].get_extent() == first.images[0].get_extent()


@pytest.mark.parametrize(("tokens", "pixels"), [(15, (1, 3, 8, 8)), (33, (2, 3, 8, 8)), (16, (64, 96)), (0, (1, 3, 8, 8))])
def test_no_square_grid(tokens: int, pixels: tuple[int, ...]) -> None:
    with pytest.raises(show_routing.UserError, match=f"a line: {tokens} image tokens of llava .* not one square grid"):
        show_routing.grid_side(tokens, pixels, "llava", "a line")


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
