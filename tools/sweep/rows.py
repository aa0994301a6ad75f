"""Results of a sweep by arm and setting."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic

from tools.sweep.folder import RESULT, RUNS
from tools.sweep.kind import Result, SomePoint


@dataclasses.dataclass(frozen=True)
class ArmResults(Generic[SomePoint]):
    """An arm at a setting: its points, one a seed, and the results of those that have one."""

    arm: str
    setting: str
    points: list[SomePoint]
    results: list[tuple[SomePoint, Result]]

    @property
    def runs(self) -> int:
        """How many different runs the results are of."""
        return len({point.same_as or point.name for point, _ in self.results})

    def each(self, get: Callable[[Result], float | None]) -> list[float]:
        """A number of every result that has it."""
        return [value for _, result in self.results if (value := get(result)) is not None]

    def missing(self) -> list[str]:
        """Names of the points that have no result yet, but for those that have none to come."""
        found = {point.name for point, _ in self.results}
        return [point.name for point in self.points if not point.problem and point.name not in found]


def gather(points: Sequence[SomePoint], out: Path) -> list[ArmResults[SomePoint]]:
    """Results by arm and setting; a point that is another's run has that one's result."""
    rows: dict[tuple[str, str], ArmResults[SomePoint]] = {}
    for point in points:
        row = rows.setdefault((point.arm, point.setting), ArmResults(point.arm, point.setting, [], []))
        row.points.append(point)
        path = out / RUNS / (point.same_as or point.name) / RESULT
        if not point.problem and path.exists():
            row.results.append((point, json.loads(path.read_text())))
    return list(rows.values())


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
