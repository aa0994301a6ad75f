"""Docstrings are sentences that stand for themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def texts() -> Iterator[tuple[str, str]]:
    """(place, text) of every docstring of the tree: of modules, classes and functions, and those under attributes."""
    for folder in ("zoo", "pretrain", "tools", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                body = getattr(node, "body", None)
                for statement in body if isinstance(body, list) else ():
                    value = statement.value if isinstance(statement, ast.Expr) else None
                    if isinstance(value, ast.Constant) and isinstance(value.value, str):
                        yield f"{path.relative_to(ROOT)}:{statement.lineno}", value.value.strip()


def test_no_docstring_is_a_fragment() -> None:
    """None begins "Of …", as if somebody had asked; none has fewer than three words, unless it refers to another."""
    found = [
        f"{place}: {text}"
        for place, text in texts()
        if text.startswith("Of ") or (len(text.split()) < 3 and not text.startswith("As `"))
    ]
    assert found == []
