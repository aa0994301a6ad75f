"""What a run reports, as files: `metrics.jsonl` and TensorBoard.

A line of `metrics.jsonl` is an object with the `step` after which it was written and numbers by name, unrounded. JSON
has no number that is not finite: these stand as the texts "NaN", "Infinity" and "-Infinity", and `read` gives them back
as numbers.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zoo.config import UserError
from zoo.files import atomic_path, atomic_write, open_here

UNREADABLE = "metrics.unreadable"
"""File beside `metrics.jsonl` that keeps the lines of it that could not be read when the run was resumed."""
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Metrics:
    """Writes one object a log step to `metrics.jsonl`, and every number to TensorBoard.

    Args:
        folder: the run folder.
        resumed_at: step of the checkpoint the run goes on from; what lies past it is cut off. None for a new run.
        log: is told of lines that cannot be read.
    """

    def __init__(self, folder: Path, resumed_at: int | None, log: Callable[[str], None] = print) -> None:
        self.path = folder / "metrics.jsonl"
        if resumed_at is None:
            atomic_write(self.path, "")
        elif unreadable := cut(self.path, resumed_at):
            numbers = ", ".join(map(str, unreadable[:5])) + (", …" if len(unreadable) > 5 else "")
            log(
                f"{self.path}: lines that cannot be read ({numbers}; {len(unreadable)} in all) now stand in "
                f"{UNREADABLE}"
            )
        self.file = self.path.open("a", encoding="utf-8")
        # readers drop events from this step on, whatever a killed run has left there
        self.writer = _event_writer(folder / "tensorboard", 0 if resumed_at is None else resumed_at + 1)

    def log(self, step: int, values: Mapping[str, float], where: Mapping[str, float] | None = None) -> None:
        """Append the object of `step`.

        Args:
            where: how far the run was besides `step`, such as its tokens; stands in the line, not in TensorBoard.
        """
        every = {**(where or {}), **values}
        finite = {name: value if math.isfinite(value) else json.dumps(value) for name, value in every.items()}
        self.file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Finish both files."""
        self.file.close()
        self.writer.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; lines that cannot be read are left out, such as one that a kill cut short."""
    items = [item for _, item in _lines(path) if item is not None]
    return [{k: NOT_FINITE.get(v, v) if isinstance(v, str) else v for k, v in item.items()} for item in items]


def cut(path: Path, step: int) -> list[int]:
    """Drop the lines past `step`, and move those that cannot be read to `UNREADABLE` beside `path`; atomic.

    A last line without an end, which a kill has cut short, is dropped. One line is in memory at a time.

    Returns:
        The numbers of the lines that were moved, from 1.
    Raises:
        UserError: `UNREADABLE` is a link, or cannot be written.
    """
    if not path.exists():
        atomic_write(path, "")
        return []
    moved, unreadable = [], path.with_name(UNREADABLE)
    try:
        descriptor = open_here(unreadable, os.O_WRONLY | os.O_APPEND)
    except OSError as error:
        raise UserError(f"{unreadable}: cannot be written ({error.strerror}); remove it, and resume") from None
    with atomic_path(path) as temporary, open(temporary, "wb") as kept, os.fdopen(descriptor, "ab") as aside:
        for number, (line, item) in enumerate(_lines(path), 1):
            if item is not None and item["step"] <= step:
                kept.write(line.rstrip(b"\n") + b"\n")
            elif item is None and line.endswith(b"\n"):
                aside.write(line)
                moved.append(number)
        aside.flush()
        os.fsync(aside.fileno())
    if not unreadable.stat().st_size:
        unreadable.unlink()
    return moved


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line, and its object as it stands there; None where it is not one of ours."""
    with open(path, "rb") as file:
        for line in file:
            try:
                item = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError):
                item = None
            if not isinstance(item, dict) or type(item.get("step")) is not int:
                yield line, None
            else:
                yield line, item


def _event_writer(folder: Path, purge_step: int) -> Any:
    """TensorBoard's writer, of a file that comes after all that are there, whatever the clock says.

    Readers go from file to file by the second in its name, and never back: what a run writes after the clock was put
    back would be shown before what it follows, or not at all.
    """
    from tensorboard.summary.writer import event_file_writer
    from torch.utils.tensorboard import SummaryWriter

    names = (re.match(r"events\.out\.tfevents\.(\d+)\.", path.name) for path in folder.glob("events.out.tfevents.*"))
    second = max([time.time(), *(int(name[1]) + 1 for name in names if name)])
    clock = event_file_writer.time
    # all it asks while it is made
    event_file_writer.time = types.SimpleNamespace(time=lambda: second)  # pyrefly: ignore[bad-assignment]
    try:
        return SummaryWriter(str(folder), purge_step=purge_step)
    finally:
        event_file_writer.time = clock
