"""The parts that docs/architecture.md shows, and the tests beside them, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from zoo import registry

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
SECTIONS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
"""Heading → text of each part that can be added."""


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_new_part(heading: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is registered here is gone again afterwards."""
    for slot, table in registry._tables.items():
        monkeypatch.setitem(registry._tables, slot, dict(table))
    torch.manual_seed(0)
    code = re.findall(r"```python\n(.*?)```", SECTIONS[heading], re.DOTALL)
    assert len(code) == 2, "a section shows the part, then its test"
    names: dict[str, object] = {}
    exec(code[0], names)
    assert "assert" in code[1]
    exec(code[1], names)


def test_files_it_names_exist() -> None:
    for path in re.findall(r"`((?:zoo|pretrain|tools|tests)/[\w./]*)`", PAGE.read_text(encoding="utf-8")):
        assert (PAGE.parents[1] / path).exists(), path
