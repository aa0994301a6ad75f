"""What a run reports, as files: `metrics.jsonl` and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.files import atomic_write


class Metrics:
    """Writes one object a log step to `metrics.jsonl`, numbers unrounded, and every scalar to TensorBoard.

    Args:
        folder: the run folder.
        resumed_at: step of the checkpoint the run goes on from; what lies past it is cut off. None for a new run.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if resumed_at is None:
            self.path.write_text("", encoding="utf-8")
        else:
            cut(self.path, resumed_at)
        self.file = self.path.open("a", encoding="utf-8")
        # readers drop events from this step on, whatever a killed run has left there
        purge = 0 if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the object of `step`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.file.close()
        self.writer.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def cut(path: Path, step: int) -> None:
    """Drop the lines past `step`; atomic."""
    kept = [item for item in read(path) if item["step"] <= step] if path.exists() else []
    atomic_write(path, "".join(json.dumps(item) + "\n" for item in kept))
