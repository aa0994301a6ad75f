"""Checkpoints that are whole or not there: atomic commit, verified loading, another number of ranks.

A checkpoint is written into `step-N.tmp`; after all ranks agree that their files are on disk, rank 0 writes a
manifest (files, sizes, checksums, what the run is), syncs, and renames the folder to `step-N`. `latest` and
`best` are small files, replaced by a rename as well, that name a folder. Nothing here trusts a folder without
a manifest. The folder must be one that all ranks see. Files of tensors are DeepSpeed's, and are unpickled
when loaded: load checkpoints of your own runs only. All else is JSON.

State of the trainer (step, data position, counters) is one dictionary of plain values, the same on every
rank: noise is a pure function of (seed, step, layer, token), so that no generator's state needs keeping.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.config import UserError
from zoo.files import atomic_path, atomic_write, checksum, remove_leftovers, sync

if TYPE_CHECKING:
    from pretrain.engine import Engine

MANIFEST = "manifest.json"
STATE = "trainer.json"
WORKERS = min(8, os.cpu_count() or 1)  # processes of a conversion, each holding some tensors in memory
_STEP = re.compile(r"step-(\d+)")


class CheckpointError(UserError):
    """A checkpoint could not be written, or none that is there can be read."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `runs/<name>/checkpoints`; made where absent.
        keep: how many of the newest to keep (at least 1); the best by validation loss is kept besides.
        log: receives one line for anything unusual; called on rank 0.
    """

    def __init__(self, folder: Path, keep: int, log: Callable[[str], None] = print) -> None:
        assert keep >= 1, f"keep={keep}: a run needs at least one checkpoint"
        self.folder, self.keep, self.log = Path(folder).absolute(), keep, log
        if set(str(self.folder)) & set("*?["):  # DeepSpeed looks for its files with a glob of the whole path
            raise UserError(
                f"the checkpoint folder {str(self.folder)!r} must not contain *, ? or [; choose another run_dir"
            )

    def clean(self, engine: Engine) -> None:
        """Remove what an interrupted save left behind; call once at the start, on all ranks."""

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            for entry in self.folder.iterdir():
                if entry.name.endswith(".old"):  # died between the two renames of a replacement
                    whole = entry.with_suffix("")
                    if self._problem(whole) is None:
                        shutil.rmtree(entry)
                    else:
                        shutil.rmtree(whole, ignore_errors=True)
                        os.replace(entry, whole)
                elif entry.name.endswith(".tmp"):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

        _on_rank_zero(engine, work, f"the checkpoint folder {str(self.folder)!r} cannot be used")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint (manifest there, every file of the right size), oldest first."""
        found = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(int(m[1]) for m in found if m and self._problem(self.folder / m[0]) is None)

    def save(self, engine: Engine, step: int, state: dict[str, Any], validation_loss: float | None = None) -> Path:
        """Commit a checkpoint of `step` and drop those no longer kept; all ranks call it, between two steps.

        Args:
            state: the trainer's own, plain values (JSON), equal on every rank.
            validation_loss: makes this the best one where it is the smallest so far.
        Raises:
            CheckpointError: on all ranks, where any rank could not write; earlier checkpoints are untouched.
        """
        target = self.folder / f"step-{step}"
        temporary = target.with_name(target.name + ".tmp")

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        _on_rank_zero(engine, prepare, f"the checkpoint of step {step} could not be written")
        checksums, problems = engine.save(temporary)
        reports = engine.ranks.gather((checksums, problems))
        written = {name: crc for files, _ in reports for name, crc in files.items()}
        problem = next((f"rank {rank}: {p[0]}" for rank, (_, p) in enumerate(reports) if p), None)

        def commit() -> None:
            if problem:
                raise OSError(problem)
            text = json.dumps(state, indent=1, allow_nan=True)
            atomic_write(temporary / STATE, text)
            files = {name: {"bytes": (temporary / name).stat().st_size, "crc32": crc} for name, crc in written.items()}
            files[STATE] = {"bytes": len(text.encode()), "crc32": zlib.crc32(text.encode())}
            loss = self._loss_of(target) if validation_loss is None else validation_loss
            manifest = _identity(engine) | {
                "step": step,
                "world": engine.ranks.world,
                "validation_loss": loss,
                "files": files,
            }
            atomic_write(temporary / MANIFEST, json.dumps(manifest, indent=1))
            sync(temporary, contents=False)
            self._put_in_place(temporary, target)
            self._point("latest", target.name)
            if loss is not None and loss < self._best_loss():
                self._point("best", target.name)

        try:
            _on_rank_zero(engine, commit, f"the checkpoint of step {step} could not be written")
        except CheckpointError:
            if engine.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            engine.ranks.barrier()
            raise
        if engine.ranks.first:
            self._prune(step)
        engine.ranks.barrier()
        return target

    def load_newest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint that every rank can read; all ranks call it.

        A checkpoint of another number of ranks is converted first (ZeRO stages 1 to 3).

        Returns: the trainer's state, or None where there is no checkpoint at all.
        Raises:
            CheckpointError: where checkpoints are there and none can be read: training must not start over.
            UserError: where the checkpoint is of another model, stage, precision or optimizer.
        """
        exists = engine.ranks.broadcast(self._any() if engine.ranks.first else None)
        if not exists:
            return None
        candidates = engine.ranks.broadcast(self.steps() if engine.ranks.first else None)
        for step in reversed(candidates):
            folder = self.folder / f"step-{step}"
            reports = engine.ranks.gather(self._damage(folder, engine.ranks.rank, engine.ranks.world))
            damage = next((f"rank {rank}: {text}" for rank, text in enumerate(reports) if text), None)
            if damage is None:
                return self._load(engine, folder)
            if engine.ranks.first:
                self.log(f"checkpoint {folder.name} cannot be read ({damage}); trying the one before")
        raise CheckpointError(
            f"{str(self.folder)!r} holds checkpoints, but none that every rank can read; restore one from a backup, "
            "or remove the folder to start over"
        )

    def _load(self, engine: Engine, folder: Path) -> dict[str, Any]:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        _check_identity(manifest, _identity(engine), folder)
        universal = manifest["world"] != engine.ranks.world and engine.stage > 0
        if universal:
            if engine.optimizer_type == "muon":
                raise UserError(
                    f"{str(folder)!r} was written by {manifest['world']} ranks, this run has {engine.ranks.world}; DeepSpeed "
                    "cannot convert Muon's momentum at stage 1: resume with as many ranks"
                )
            source = folder
            folder = folder.with_name(folder.name + ".universal")
            _on_rank_zero(engine, lambda: _convert(source, folder, self.log), f"{source.name} could not be converted")
        try:
            engine.load(folder, universal)
            problem = ""
        except Exception as error:  # whatever one rank meets, the others must hear of it
            problem = f"{type(error).__name__}: {error}"
        problems = [f"rank {rank}: {text}" for rank, text in enumerate(engine.ranks.gather(problem)) if text]
        if problems:
            raise CheckpointError(f"{str(folder)!r} could not be loaded: {problems[0]}")
        return json.loads((folder.with_name(f"step-{manifest['step']}") / STATE).read_text(encoding="utf-8"))

    def _any(self) -> bool:
        return self.folder.is_dir() and any(_STEP.fullmatch(entry.name) for entry in self.folder.iterdir())

    def _problem(self, folder: Path) -> str | None:
        """Why `folder` is no complete checkpoint, by its manifest and file sizes; None where it is one."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            for name, entry in manifest["files"].items():
                size = (folder / name).stat().st_size
                if size != entry["bytes"]:
                    return f"{name} has {size} bytes, its manifest says {entry['bytes']}"
        except (OSError, ValueError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def _damage(self, folder: Path, rank: int, world: int) -> str:
        """What this rank finds wrong; checksums of its share of the files (every world-th) are compared."""
        problem = self._problem(folder)
        if problem:
            return problem
        try:
            files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
            for name in sorted(files)[rank::world]:
                if checksum(folder / name) != files[name]["crc32"]:
                    return f"{name} does not have the checksum of its manifest"
        except OSError as error:
            return str(error)
        return ""

    def _loss_of(self, folder: Path) -> float | None:
        """Validation loss in the manifest of `folder`; None where there is none."""
        try:
            return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["validation_loss"]
        except (OSError, ValueError, KeyError):
            return None

    def _best(self) -> str:
        """Name of the best checkpoint's folder; empty where there is none."""
        try:
            return (self.folder / "best").read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _best_loss(self) -> float:
        loss = self._loss_of(self.folder / self._best()) if self._best() else None
        return math.inf if loss is None else loss

    def _put_in_place(self, temporary: Path, target: Path) -> None:
        """Rename; a checkpoint of the same step gives way only once the new one is complete."""
        old = target.with_name(target.name + ".old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(target, old)
        os.replace(temporary, target)
        sync(self.folder, contents=False)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(target.with_name(target.name + ".universal"), ignore_errors=True)

    def _point(self, pointer: str, name: str) -> None:
        atomic_write(self.folder / pointer, name + "\n")

    def _prune(self, step: int) -> None:
        """Keep the newest `keep` up to `step` and the best. Later ones belong to a future this run went back from."""
        kept = {f"step-{s}" for s in [s for s in self.steps() if s <= step][-self.keep :]} | {self._best()}
        for entry in self.folder.iterdir():
            match = _STEP.match(entry.name)
            if match and match[0] not in kept:
                shutil.rmtree(entry, ignore_errors=True)


def _identity(engine: Engine) -> dict[str, Any]:
    return {
        "stage": engine.stage,
        "precision": engine.precision,
        "optimizer": engine.optimizer_type,
        "parameters": engine.parameter_shapes(),
    }


def _check_identity(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raises UserError naming what differs between the checkpoint and this run."""
    ways_out = {
        "stage": "a stage is part of a checkpoint: resume with the same one",
        "precision": "resume with the same train.precision",
        "optimizer": "resume with the same optimizer.type",
    }
    for key, way_out in ways_out.items():
        if found[key] != wanted[key]:
            raise UserError(f"{str(folder)!r} has {key} {found[key]!r}, this run {wanted[key]!r}; {way_out}")
    there, here = found["parameters"], wanted["parameters"]
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


def _convert(source: Path, target: Path, log: Callable[[str], None]) -> None:
    """Write `source` as a universal checkpoint, which any number of ranks can load; nothing where it is there."""
    from pretrain.engine import TAG

    if target.is_dir():
        return
    log(f"converting {source.name} for another number of ranks")
    # Relative paths: the converter reads them as patterns, so that a "(" or "+" further up would break it.
    with atomic_path(target) as temporary:
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        command += ["--input_folder", f"{source.name}/{TAG}", "--output_folder", f"{temporary.name}/{TAG}"]
        command += ["--num_extract_workers", str(WORKERS), "--num_merge_workers", str(WORKERS)]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise OSError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def _on_rank_zero(engine: Engine, work: Callable[[], None], what: str) -> None:
    """Run `work` on rank 0; where it raises OSError, every rank raises CheckpointError beginning with `what`."""
    problem = ""
    if engine.ranks.first:
        try:
            work()
        except OSError as error:
            problem = str(error) or type(error).__name__
    problem = engine.ranks.broadcast(problem)
    if problem:
        raise CheckpointError(f"{what}: {problem}. Free space or repair the disk; earlier checkpoints are intact")
