"""What a kind of sweep must say of itself, so that runs of every kind are launched, kept and gathered alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

Result = dict[str, Any]
"""What a finished run has left in `result.json`."""


class Point(Protocol):
    """One run of a sweep, as planned. Must be a frozen dataclass whose fields become JSON; the plan is kept in a
    file."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def arm(self) -> str:
        """The name that the sweep's file gives to what is compared."""

    @property
    def setting(self) -> str:
        """What arms are compared at, such as a share of FLOPs or the size of a model, as tables show it."""

    @property
    def seed(self) -> int: ...

    @property
    def name(self) -> str:
        """The name of its folder; unlike that of any other point."""

    @property
    def problem(self) -> str:
        """Why there is no such run; "" where there is one."""

    @property
    def same_as(self) -> str:
        """The name of an earlier point that is the very same run, whose result counts for both; "" where there is
        none."""


SomePoint = TypeVar("SomePoint", bound=Point)


class Sweep(Protocol[SomePoint]):
    """A kind of sweep; an object of it is one sweep, as its file says. `tools.sweep.kinds.KINDS` lists all of them."""

    type: ClassVar[str]
    """The value of the key `type` in the files of this kind."""
    free_settings: ClassVar[frozenset[str]]
    """Keys of `settings` that may change once a run is finished."""

    @property
    def jobs(self) -> int:
        """How many runs go on side by side."""

    @property
    def accelerators(self) -> int:
        """How many devices, or ranks, one run takes."""

    @classmethod
    def load(cls, data: Mapping[str, Any], folder: Path) -> Self:
        """Read a sweep.

        Args:
            data: what its file says, without `type`.
            folder: the folder of that file; paths in it are relative to it where the kind says so.
        Raises:
            ConfigError: naming the dotted key, the value, the rule and the way out.
        """

    def shared(self) -> dict[str, Any]:
        """What all runs of an output folder have in common, as JSON; the folder of a sweep with others is refused."""

    def plan_key(self) -> dict[str, Any]:
        """All that the plan follows from, as JSON; a kept plan of the same key is taken as it is."""

    def plan(self, out: Path) -> Sequence[SomePoint]:
        """Expand the sweep into its points, in the order in which they are run.

        Args:
            out: the output folder, for what is measured once for all of them.
        Raises:
            UserError: a mistake of the user's; nothing has been launched yet.
        """

    def preview(self, points: Sequence[SomePoint]) -> str:
        """What is to be known before anything is launched, such as a table of costs; "" where there is nothing."""

    @staticmethod
    def read_point(data: Mapping[str, Any]) -> SomePoint:
        """A point from what JSON made of it."""

    def settings(self, point: SomePoint, folder: Path) -> dict[str, Any]:
        """All that a run needs to know, as JSON.

        Args:
            folder: where the run may write.
        """

    def discard(self, folder: Path) -> None:
        """Remove what an unfinished run has left in its folder that does not hold under other settings."""

    @classmethod
    def run(cls, folder: Path, settings: dict[str, Any]) -> Result:
        """Do a run, or go on with it, in a process of its own.

        Args:
            folder: where the run may write. What it trains in is `folder / "run"`, which is removed once it is
                finished.
        Raises:
            UserError: it failed.
        """

    def kept(self, folder: Path) -> list[Path]:
        """The files of a finished run, beside its result, that the report reads; together a few kilobytes."""

    def summary(self, result: Result) -> str:
        """What a finished run has found, in a few words."""

    def measure(self, points: Sequence[SomePoint], out: Path) -> None:
        """Measure what is measured once, alone on the machine, after all runs; what `out` already holds is kept."""

    def report(self, points: Sequence[SomePoint], out: Path) -> list[Path]:
        """Write what the finished runs have found; returns the files."""
