"""What a checkpoint says it is, and whether a run may go on from it."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.manifest import DamageError, read_manifest
from zoo.config import UserError

if TYPE_CHECKING:
    from pretrain.engine import Engine

PACKAGES = ("early-fusion-zoo", "torch", "deepspeed", "numpy", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a checkpoint and the run that loads it must have in common."""

    stage: int
    precision: str
    optimizer: str
    parameters: Mapping[str, list[int]]
    """Whole shape of each, by dotted name, in the model's order."""

    @classmethod
    def of(cls, engine: Engine) -> Identity:
        """That of the run."""
        return cls(engine.stage, engine.precision, engine.optimizer_type, engine.parameter_shapes())


@dataclasses.dataclass(frozen=True)
class CheckpointRecord:
    """What the manifest of a checkpoint says it is."""

    step: int
    world: int
    """Ranks that wrote it."""
    validation_loss: float | None
    identity: Identity
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Versions of the packages that computed the run."""

    @classmethod
    def read(cls, folder: Path) -> CheckpointRecord:
        """That of the checkpoint in `folder`. Raises DamageError where its manifest or the size of a file is wrong."""
        manifest = read_manifest(folder)
        manifest.check_sizes(folder)
        try:
            about = dict(manifest.about)
            record = cls(**about | {"identity": Identity(**about["identity"])})
        except (KeyError, TypeError):
            raise DamageError("its manifest is not that of a checkpoint of this version") from None
        if folder.name != f"step-{record.step}":
            raise DamageError(f"its manifest is that of step {record.step}")
        return record


def versions() -> dict[str, str]:
    """Versions of the packages on which the numbers of a run depend, of those that are installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def check_identity(found: Identity, wanted: Identity, folder: Path) -> None:
    """Raises UserError naming what differs between the checkpoint and this run."""
    for key, there, here, way_out in (
        ("stage", found.stage, wanted.stage, "a stage is part of a checkpoint: resume with the same one"),
        ("precision", found.precision, wanted.precision, "resume with the same train.precision"),
        ("optimizer", found.optimizer, wanted.optimizer, "resume with the same optimizer.type"),
    ):
        if there != here:
            raise UserError(f"{str(folder)!r} has {key} {there!r}, this run {here!r}; {way_out}")
    there, here = found.parameters, wanted.parameters
    if there == here:
        return
    lines = [f"only in the checkpoint: {name} {there[name]}" for name in there if name not in here]
    lines += [f"only in this run: {name} {here[name]}" for name in here if name not in there]
    lines += [
        f"{n}: {there[n]} in the checkpoint, {here[n]} in this run" for n in here if there.get(n, here[n]) != here[n]
    ]
    lines = lines or ["the same parameters in another order"]
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise UserError(
        f"{str(folder)!r} is of another model: {'; '.join(lines[:5])}{more}. Use the recipe it was trained with, or "
        "another name or run_dir"
    )
