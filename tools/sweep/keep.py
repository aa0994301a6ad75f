"""Finished runs as small files that can be kept with the code: `--rows FOLDER`.

FOLDER/NAME.json.gz holds the settings of a run, its result, and the files that a report reads. A sweep takes what it
has there for done, on any machine, and adds what it finishes: one that needs more hours than a machine gives goes on on
the next.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import recipe as recipes
from tools.sweep.folder import POINT, RESULT, write_json
from tools.sweep.kind import Sweep
from zoo.config import UserError
from zoo.files import atomic_write

PLACES = re.compile(r".*\.(run_dir|data\.path|data\.cache|modalities\.[^.]+\.path)")
"""Settings that say where things lie on a machine; which data they are is known by content."""
SUFFIX = ".json.gz"


def keep(sweep: Sweep[Any], run: Path, rows: Path) -> None:
    """Write a finished run's file in `rows`, the same bytes whenever it is written; one that is there stays."""
    path = rows / (run.name + SUFFIX)
    if path.exists():
        return
    files = {str(file.relative_to(run)): base64.b64encode(file.read_bytes()).decode() for file in sweep.kept(run)}
    row = {
        "settings": json.loads((run / POINT).read_text()),
        "result": json.loads((run / RESULT).read_text()),
        "files": files,
    }
    rows.mkdir(parents=True, exist_ok=True)
    atomic_write(path, gzip.compress(json.dumps(row).encode(), mtime=0))


def take(sweep: Sweep[Any], folders: Sequence[Path], rows: Path) -> list[Path]:
    """Make finished runs of those among `folders`, as `folder.prepare` left them, that `rows` has; returns the others.

    Raises:
        UserError: a row is of a run with other settings, or cannot be read.
    """
    left = []
    for run in folders:
        path = rows / (run.name + SUFFIX)
        if not path.exists():
            left.append(run)
            continue
        row = _read(path)
        wanted = json.loads((run / POINT).read_text())
        lines = [
            line
            for key in sorted(wanted.keys() - sweep.free_settings)
            for line in recipes.differences({key: row["settings"].get(key)}, {key: wanted[key]}, but=PLACES)
        ]
        if lines:
            raise UserError(
                f"{path} is of a run of that name with other settings; name the arm anew, or remove the file. "
                "Different are\n  " + "\n  ".join(lines)
            )
        for name, content in row["files"].items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(run / name, base64.b64decode(content))
        write_json(run / RESULT, row["result"])
    return left


def _read(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); restore it, or remove it, and the run is done anew"
        ) from None
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in row["files"])
    if not inside:
        raise UserError(f"{path}: names a file outside the run's folder; it is not of a sweep's making, remove it")
    return row
