"""`python -m tools.generate`: files and a page by itself, the same at any batch size, and its errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import zoo
from pretrain import recipe as recipes
from pretrain import run_folder
from tests.pretrain.runs import tiny_recipe
from tools.generate import main
from zoo.kept import keep_modalities


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run folder of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("generate") / "run"
    folder.mkdir()
    recipe = recipes.resolve(tiny_recipe("data", folder))
    run_folder.write_recipe(folder, recipe, {})
    run_folder.save_model(folder, zoo.build("model", recipe.model, seed=1).state_dict())
    image: Any = recipe.modalities["image"]
    codebook = np.arange(16 * 4, dtype=np.uint8).reshape(16, 4) * 4
    keep_modalities(folder, {"text": recipe.modalities["text"].open(), "image": image.block(image, codebook)})
    return folder


def call(run: Path, out: Path, *arguments: object) -> int:
    return main([str(run), "--out", str(out), *map(str, arguments)])


def test_parts_become_files_and_one_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (20, 30), 90).save(tmp_path / "in.png")
    given = ["--prompt", "a <b>", "--image", tmp_path / "in.png", "--prompt", "then", "--then", "image", "text"]
    options = ["--max-tokens", 24, "--samples", 2, "--seed", 3, "--temperature", 2]
    assert call(run, tmp_path / "out", *given, *options) == 0
    assert capsys.readouterr().out.endswith(f"4 files and index.html are in {tmp_path / 'out'}\n")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000-0.png", "000-1.txt", "001-0.png", "001-1.txt", "index.html"]
    with Image.open(tmp_path / "out" / "000-0.png") as image:
        assert image.size == (8, 8)
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<section>") == 2 and page.count("data:image/png;base64,") == 4
    assert "a &lt;b&gt;" in page and not re.search(r'(?:src|href)="(?!data:)', page), "it needs no other file"
    assert call(run, tmp_path / "one", *given, *options, "--batch", 1) == 0
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.png").write_text("no picture")
    cases: list[tuple[list[object], str]] = [
        (["--then", "audio"], f"audio: {run} has no modality that reads it; it has text, image"),
        (["--then", "imgae"], "then: 'imgae' is no modality of"),
        (["--image", tmp_path / "no.png"], "no.png: is no image that image reads"),
        (["--audio", "a.wav"], "audio: "),
        (["--prompt", "x" * 80], "prompt: takes 81 tokens"),
        (["--temperature", -1], "generate.temperature: -1.0"),
        (["--samples", 0], "--samples 0"),
        (["--steps", 0], "drawing.steps: 0"),
    ]
    for arguments, reason in cases:
        assert call(run, tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error and error.count("\n") == 1
    assert call(tmp_path, tmp_path / "out") == 2 and "recipe.yaml: does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
