"""The folder of a sweep: whose it is, its plan, and the folder of each run.

OUT/sweep.json                 what all runs share
OUT/plan.json                  the points
OUT/runs/NAME/point.json       all that one run needs to know
OUT/runs/NAME/run/             what it trains in, until it is finished
OUT/runs/NAME/result.json      what it has found; it is finished
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.sweep.kind import SomePoint, Sweep
from zoo.config import UserError
from zoo.files import atomic_write

PLAN, SWEEP, RUNS = "plan.json", "sweep.json", "runs"
POINT, RESULT, RUN = "point.json", "result.json", "run"


def check_folder(sweep: Sweep[Any], out: Path) -> None:
    """Claim `out` for the sweep: it is new, or of a sweep that shares what finished runs depend on.

    Raises:
        UserError: it belongs to another.
    """
    ours = sweep.shared()
    if (out / SWEEP).exists():
        theirs = json.loads((out / SWEEP).read_text())
        changed = [
            f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]
        ]
        if changed:
            raise UserError(
                f"{out} belongs to another sweep; give another folder. Different are\n  " + "\n  ".join(changed)
            )
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / SWEEP, ours)


def planned(sweep: Sweep[SomePoint], out: Path) -> Sequence[SomePoint]:
    """The points of the sweep; kept in `out` until what they follow from changes."""
    key, path = sweep.plan_key(), out / PLAN
    if path.exists() and (kept := json.loads(path.read_text()))["of"] == key:
        return [sweep.read_point(point) for point in kept["points"]]
    points = sweep.plan(out)
    write_json(path, {"of": key, "points": [dataclasses.asdict(point) for point in points]})
    return points


def prepare(sweep: Sweep[SomePoint], point: SomePoint, out: Path) -> Path:
    """The run's folder, with all that it needs to know.

    Raises:
        UserError: it holds a finished run of this name with other settings.
    """
    folder = out / RUNS / point.name
    wanted = json.loads(json.dumps(sweep.settings(point, folder)))
    path = folder / POINT
    if path.exists():
        there = json.loads(path.read_text())
        changed = [key for key in wanted if key not in sweep.free_settings and wanted[key] != there.get(key)]
        if changed and (folder / RESULT).exists():
            raise UserError(
                f"{folder} holds a run of that name with another {' and '.join(changed)}; name the arm anew, or remove "
                "the folder"
            )
        if changed:
            sweep.discard(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)
    return folder


def write_json(path: Path, data: Any) -> None:
    """Make `data` all that the file holds."""
    atomic_write(path, json.dumps(data, indent=1) + "\n")
