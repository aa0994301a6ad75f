"""Results of a sweep by arm and target."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tools.adapt_sweep.plan import Point

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """An arm at a target: its points, and the results of those that have one."""

    arm: str
    target: float
    points: list[Point]
    results: list[tuple[Point, Result]]

    @property
    def runs(self) -> int:
        """How many different runs the results are of."""
        return len({point.same_as or point.name for point, _ in self.results})

    def each(self, get: Callable[[Result], float | None]) -> list[float]:
        return [value for _, result in self.results if (value := get(result)) is not None]


def gather(points: Sequence[Point], out: Path) -> list[Row]:
    """Results by arm and target; a point that is another's run has that one's result."""
    rows: dict[tuple[str, float], Row] = {}
    for point in points:
        row = rows.setdefault((point.arm, point.target), Row(point.arm, point.target, [], []))
        row.points.append(point)
        path = out / "runs" / (point.same_as or point.name) / "result.json"
        if not point.problem and path.exists():
            row.results.append((point, json.loads(path.read_text())))
    return list(rows.values())


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
