"""What reports of all kinds of sweeps have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tools.sweep.rows import ArmResults


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    return "\n".join(["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads), *map(_line, lines)])


def unfinished(rows: Sequence[ArmResults[Any]]) -> list[str]:
    """A sentence that names the runs without a result, if there are any."""
    missing = [name for row in rows for name in row.missing()]
    return [f"Not finished yet: {', '.join(missing)}."] if missing else []


def problems(rows: Sequence[ArmResults[Any]]) -> list[str]:
    """A list of the points that could not be run and why, if there are any."""
    lines = [f"- {point.name}: not run, {point.problem}." for row in rows for point in row.points if point.problem]
    return ["\n".join(lines)] if lines else []


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
