"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import zoo
from zoo.registry import _tables

README = Path(__file__).parents[1] / "README.md"


def block(language: str, containing: str) -> str:
    """The README's code block in `language` that contains a text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in blocks if containing in text)


@pytest.fixture
def own_block(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The Python example, run; the block it registers is gone again afterwards."""
    monkeypatch.setitem(_tables, "feedforward", dict(_tables["feedforward"]))
    names: dict[str, object] = {}
    exec(block("python", "@register"), names)
    return names


def test_python(own_block: dict[str, object]) -> None:
    logits = own_block["logits"]
    assert logits.shape == (1, 6, 1000) and logits.isfinite().all()
    assert own_block["model"].cost(6).flops[0] > 0


def test_yaml(own_block: dict[str, object]) -> None:
    recipe = yaml.safe_load(block("yaml", "my_blocks"))
    model = zoo.build("model", {**recipe["model"], "vocab_size": 100})
    assert len(model.layers) == 8


def test_commands_name_files_that_exist() -> None:
    for path in re.findall(r"(?:tools|recipes|docs)/[\w./]+\.(?:sh|yaml|md|png)", README.read_text(encoding="utf-8")):
        assert (README.parent / path).exists(), path
