"""Checkpoints that are whole or not there: atomic commit, verified loading, another number of ranks.

A checkpoint is written into `step-N.tmp`; after all ranks agree that their files are on the disk, rank 0 seals it with
a manifest (`pretrain.manifest`) and renames the folder to `step-N`. `latest` and `best` are small files that name a
folder. Nothing here trusts a folder without a manifest that holds. The folder must be one that all ranks see. Files of
tensors are DeepSpeed's and read as tensors and plain values alone, so that none of them runs code. All else is JSON.

The state of the trainer (step, data position, counters) is one dictionary of plain values, the same on every rank:
noise is a pure function of (seed, step, layer, token), so that no generator's state needs keeping.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoint_record import CheckpointRecord, Identity, check_identity, versions
from pretrain.manifest import DamageError, read_manifest, write_manifest
from zoo.config import UserError
from zoo.files import atomic_write, remove_leftovers, sync

if TYPE_CHECKING:
    from pretrain.engine import Engine, Writing, Written

STATE = "trainer.json"
_NAME = r"step-(?:0|[1-9]\d*)"
_STEP = re.compile(_NAME)
_STEP_OR_UNIVERSAL = re.compile(rf"({_NAME})(\.universal)?")
_WRITTEN = rf"latest|best|{_NAME}\.universal"  # what is put in place by `atomic_write` and `atomic_path`
_UNFINISHED = re.compile(rf"{_NAME}\.tmp")
_REPLACED = re.compile(rf"({_NAME})\.old")


class CheckpointError(UserError):
    """A checkpoint could not be written, or none that is there can be read."""


@dataclasses.dataclass(frozen=True)
class _Checkpoint:
    """What is to be committed, once its files of tensors are written."""

    step: int
    state: Mapping[str, Any]
    validation_loss: float | None


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
        self._begun: tuple[_Checkpoint, Writing] | None = None
        if set(str(self.folder)) & set("*?["):  # DeepSpeed looks for its files with a glob of the whole path
            raise UserError(
                f"the checkpoint folder {str(self.folder)!r} must not contain *, ? or [; choose another run_dir"
            )

    def clean(self, engine: Engine) -> None:
        """Remove what an interrupted save left behind, by its exact names; call once at the start, on all ranks."""

        def work() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder, _WRITTEN)
            for entry in [entry for entry in self.folder.iterdir() if entry.is_dir()]:
                if _UNFINISHED.fullmatch(entry.name):
                    shutil.rmtree(entry)
                elif replaced := _REPLACED.fullmatch(entry.name):  # died between the two renames of a replacement
                    whole = self.folder / replaced[1]
                    if self._problem(whole):
                        shutil.rmtree(whole, ignore_errors=True)
                        os.replace(entry, whole)
                    else:
                        shutil.rmtree(entry)

        _on_rank_zero(engine, work, f"the checkpoint folder {str(self.folder)!r} cannot be used")

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint (a manifest that holds, every file of the right size), oldest first."""
        return [step for step in self._found() if not self._problem(self._of(step))]

    # ------------------------------------------------------------------------------------------------------------ save

    def save(self, engine: Engine, step: int, state: Mapping[str, Any], validation_loss: float | None = None) -> Path:
        """Commit a checkpoint of `step` and drop those no longer kept; all ranks call it, between two steps.

        Args:
            state: the trainer's own, plain values (JSON), equal on every rank.
            validation_loss: makes this the best one where it is the smallest so far.
        Raises:
            CheckpointError: on all ranks, where any rank could not write; earlier checkpoints are untouched.
        """
        temporary = self._prepare(engine, step)
        return self._finish(engine, _Checkpoint(step, dict(state), validation_loss), engine.save(temporary))

    def begin(self, engine: Engine, step: int, state: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """As `save`, but training may go on while the files are written; `finish` commits the checkpoint.

        None may be unfinished. Until it is committed it is not there, whatever happens.
        """
        assert self._begun is None, "the checkpoint before this one is not finished"
        temporary = self._prepare(engine, step)
        self._begun = (_Checkpoint(step, dict(state), validation_loss), engine.save_later(temporary))

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing a checkpoint that has begun."""
        return self._begun is not None and not self._begun[1].done

    @property
    def unfinished(self) -> bool:
        """Whether a checkpoint has begun that is not committed; the same on every rank."""
        return self._begun is not None

    def finish(self, engine: Engine) -> None:
        """Wait for the checkpoint that has begun, if one has, and commit it; all ranks call it, between two steps.

        Raises:
            CheckpointError: as `save`.
        """
        if self._begun is not None:
            (checkpoint, writing), self._begun = self._begun, None
            self._finish(engine, checkpoint, writing.wait())

    def _prepare(self, engine: Engine, step: int) -> Path:
        """The folder into which the ranks write a checkpoint before it is committed; made on rank 0, empty."""
        temporary = self._of(step).with_name(f"step-{step}.tmp")

        def work() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        _on_rank_zero(engine, work, f"the checkpoint of step {step} could not be written")
        return temporary

    def _finish(self, engine: Engine, checkpoint: _Checkpoint, written: Written) -> Path:
        """Commit what all ranks have written."""
        step, reports = checkpoint.step, engine.ranks.gather(written)
        target = self._of(step)
        temporary = target.with_name(target.name + ".tmp")

        def commit() -> None:
            loss = self._loss_of(target) if checkpoint.validation_loss is None else checkpoint.validation_loss
            record = CheckpointRecord(step, engine.ranks.world, loss, Identity.of(engine), versions())
            self._commit(temporary, record, checkpoint.state, reports)

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

    def _commit(
        self, temporary: Path, record: CheckpointRecord, state: Mapping[str, Any], reports: Sequence[Written]
    ) -> None:
        """Make a checkpoint of what the ranks have written into `temporary`; on rank 0.

        Args:
            reports: of every rank, in order.
        Raises:
            OSError: a rank could not write all of its files.
        """
        target = self._of(record.step)
        problem = next((f"rank {rank}: {each.problems[0]}" for rank, each in enumerate(reports) if each.problems), None)
        if problem:
            raise OSError(problem)
        checksums = {name: checksum for each in reports for name, checksum in each.checksums.items()}
        self._seal(temporary, record, state, checksums)
        self._put_in_place(temporary, target)
        atomic_write(self.folder / "latest", target.name + "\n")
        if record.validation_loss is not None and record.validation_loss < self._best_loss():
            atomic_write(self.folder / "best", target.name + "\n")

    def _seal(
        self, folder: Path, record: CheckpointRecord, state: Mapping[str, Any], checksums: Mapping[str, int]
    ) -> None:
        """Write the trainer's state and, last, the manifest of all files."""
        text = json.dumps(state, indent=1)
        atomic_write(folder / STATE, text)
        write_manifest(folder, dataclasses.asdict(record), {**checksums, STATE: zlib.crc32(text.encode())})
        sync(folder, contents=False)

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

    def _prune(self, step: int) -> None:
        """Keep the newest `keep` up to `step` and the best. Later ones belong to a future this run went back from."""
        kept = {self._of(s).name for s in [s for s in self.steps() if s <= step][-self.keep :]} | {self._best()}
        for entry in list(self.folder.iterdir()):
            match = _STEP_OR_UNIVERSAL.fullmatch(entry.name)
            if match is None or match[1] in kept:
                continue
            problem = "" if match[2] else self._problem(entry)
            if problem:
                self.log(f"checkpoint {entry.name} is removed: {problem}; step-{step} is whole")
            shutil.rmtree(entry, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------------ load

    def load_newest(self, engine: Engine) -> dict[str, Any] | None:
        """Load the newest checkpoint that every rank can read; all ranks call it.

        One that is damaged is passed over, and said. A checkpoint of another number of ranks is converted first (ZeRO
        stages 1 to 3).

        Returns: the trainer's state, or None where there is no checkpoint at all.
        Raises:
            CheckpointError: where checkpoints are there and none can be read: training must not start over.
            UserError: where the checkpoint is of another model, stage, precision or optimizer.
        """
        passed_over = []
        for step in reversed(engine.ranks.broadcast(self._found() if engine.ranks.first else None)):
            folder = self._of(step)
            damage = _first_problem(engine, self._damage(folder, engine.ranks.rank, engine.ranks.world))
            if not damage:
                return self._load(engine, folder)
            passed_over.append(f"{folder.name}: {damage}")
            if engine.ranks.first:
                self.log(f"checkpoint {folder.name} is passed over: {damage}")
        if not passed_over:
            return None
        raise CheckpointError(
            f"{str(self.folder)!r} holds checkpoints, but none that every rank can read; restore one from a backup, or "
            "remove the folder to start over:\n  " + "\n  ".join(passed_over)
        )

    def _load(self, engine: Engine, source: Path) -> dict[str, Any]:
        record = CheckpointRecord.read(source)
        check_identity(record.identity, Identity.of(engine), source)
        now = versions()
        other = [
            f"{name} {there}, now {now.get(name)}" for name, there in record.versions.items() if there != now.get(name)
        ]
        if other and engine.ranks.first:
            self.log(f"{source.name} was written with {'; '.join(other)}: the run may not go on bit for bit")
        universal = record.world != engine.ranks.world and engine.stage > 0
        folder = self._converted(engine, source, record.world) if universal else source
        problem = ""
        try:
            engine.load(folder, universal)
        except Exception as error:  # whatever one rank meets, the others must hear of it
            problem = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        problem = _first_problem(engine, problem)
        if problem:
            raise CheckpointError(f"{str(folder)!r} could not be loaded: {problem}")
        return json.loads((source / STATE).read_text(encoding="utf-8"))

    def _converted(self, engine: Engine, source: Path, world: int) -> Path:
        """The universal checkpoint made of `source`, which `world` ranks wrote; made anew unless it is there and
        whole."""
        from pretrain import universal

        if engine.optimizer_type == "muon":
            raise UserError(
                f"{str(source)!r} was written by {world} ranks, this run has {engine.ranks.world}; DeepSpeed cannot "
                "convert Muon's momentum at stage 1: resume with as many ranks"
            )
        folder = universal.universal_folder(source)
        problem = _first_problem(engine, universal.damage_of(source, engine.ranks.rank, engine.ranks.world))
        if problem:
            if engine.ranks.first and folder.exists():
                self.log(f"{folder.name} is made again: {problem}")
            if engine.ranks.first:
                self.log(f"converting {source.name} for another number of ranks")
            _on_rank_zero(engine, lambda: universal.convert(source), f"{source.name} could not be converted")
        return folder

    # ------------------------------------------------------------------------------------------------- what is on disk

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _found(self) -> list[int]:
        """Steps with a checkpoint, complete or damaged, oldest first."""
        found = (_STEP.fullmatch(entry.name) for entry in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted(int(match[0].removeprefix("step-")) for match in found if match)

    def _problem(self, folder: Path) -> str:
        """Why `folder` cannot be a whole checkpoint, by its manifest and the sizes of its files; empty where it can."""
        try:
            CheckpointRecord.read(folder)
        except DamageError as error:
            return str(error)
        return ""

    def _damage(self, folder: Path, rank: int, world: int) -> str:
        """What this rank finds wrong; it reads its share of the files, every `world`-th."""
        try:
            CheckpointRecord.read(folder)
            read_manifest(folder).check_contents(folder, rank, world)
        except DamageError as error:
            return str(error)
        return ""

    def _loss_of(self, folder: Path) -> float | None:
        """Validation loss in the manifest of `folder`; None where there is none."""
        try:
            return CheckpointRecord.read(folder).validation_loss
        except DamageError:
            return None

    def _best(self) -> str:
        """Name of the best checkpoint's folder; empty where there is none."""
        try:
            name = (self.folder / "best").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return ""
        return name if _STEP.fullmatch(name) else ""

    def _best_loss(self) -> float:
        loss = self._loss_of(self.folder / self._best()) if self._best() else None
        return math.inf if loss is None else loss


def _first_problem(engine: Engine, problem: str) -> str:
    """What the first rank that has a problem says, on every rank; empty where none has; collective."""
    problems = enumerate(engine.ranks.gather(problem))
    return next((f"rank {rank}: {text}" for rank, text in problems if text), "")


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
