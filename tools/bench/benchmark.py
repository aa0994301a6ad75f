"""What a benchmark is: a small function that builds tasks to be timed in turn, and says which pairs make a row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.bench import measure
from tools.bench.measure import BOTH, FORWARD, Sample, Task
from zoo.config import UserError, suggestion

LOWER, HIGHER = "lower", "higher"


class Unavailable(UserError):
    """A benchmark cannot run here: a package, a compiler or a path is missing. It is left out and named."""


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a ratio should reach: `target` is the least, `aim` what is wished for; None where nothing is asked."""

    target: float | None = None
    aim: float | None = None


NONE = Goal()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A pair of variants, read in one direction.

    `lower`: the row's ratio is the time of ours over the other's. `higher`: the time of the other over ours, a
    speed-up.
    """

    ours: str
    other: str | None
    """None: ours alone, against `floor_ms`."""
    better: str = LOWER
    goals: Mapping[str, Goal] = dataclasses.field(default_factory=dict)
    """Goals by mode."""
    expected: float | None = None
    """Time of ours over the other's that the count of operations predicts: the ratio is then relative to it (`lower`),
    or the share of that speed-up which is reached (`higher`)."""
    floor_ms: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """By mode: the least ms that ours could take, where `other` is None."""
    note: str = ""
    label: str = ""
    """What the row is called; default: the pair in the direction in which it is read."""

    def title(self) -> str:
        if self.label:
            return self.label
        if self.other is None:
            return f"least time / {self.ours}"
        expected = self.expected or 1.0
        if self.better == LOWER:
            pair, predicted = f"{self.ours} / {self.other}", f"{expected:.3f}"
        else:
            pair, predicted = f"{self.other} / {self.ours}", f"{1 / expected:.2f}"
        return pair if expected == 1.0 else f"({pair}) / predicted {predicted}"

    def ratio(self, mode: str) -> Callable[[float, float], float]:
        """The row's ratio from the seconds of ours and of the other."""
        if self.other is None:
            return lambda ours, _: self.floor_ms[mode] / 1e3 / ours
        expected = self.expected or 1.0
        if self.better == LOWER:
            return lambda ours, other: ours / (other * expected)
        return lambda ours, other: other * expected / ours


@dataclasses.dataclass(frozen=True)
class TableRow:
    """One line of the table and of the JSON file."""

    name: str
    mode: str
    ours_ms: float | None
    other_ms: float | None
    ratio: float
    better: str
    target: float | None
    aim: float | None
    spread: tuple[float, float] | None = None
    """Smallest and largest ratio of a round."""
    cpu_ratio: float | None = None
    """The same ratio of CPU times."""
    floor: float | None = None
    """The least ms that ours could take, where the count of operations says so."""
    rounds: int | None = None
    busy: bool = False
    """Other processes used the machine in too many rounds: read `cpu_ratio`."""
    note: str = ""

    def reaches(self, goal: float | None) -> bool | None:
        if goal is None:
            return None
        return self.ratio <= goal if self.better == LOWER else self.ratio >= goal

    @property
    def met(self) -> bool | None:
        return self.reaches(self.target)

    @property
    def aim_met(self) -> bool | None:
        return self.reaches(self.aim)

    def to_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self) | {"met": self.met, "aim_met": self.aim_met}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TableRow:
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Group:
    """What one benchmark measures in turn."""

    tasks: Mapping[str, Mapping[str, Task]] = dataclasses.field(default_factory=dict)
    """{mode: {variant: task}}"""
    comparisons: Sequence[Comparison] = ()
    figures: Sequence[TableRow] = ()
    """Rows that are not times, such as errors; the benchmark's name is put before theirs."""

    def named_figures(self, benchmark: str) -> list[TableRow]:
        return [dataclasses.replace(row, name=f"{benchmark}: {row.name}") for row in self.figures]

    def rows(self, benchmark: str, mode: str, samples: Mapping[str, list[Sample]]) -> list[TableRow]:
        result = []
        for pair in self.comparisons:
            if pair.ours not in samples:
                continue
            other = None if pair.other is None else samples[pair.other]
            reading = measure.read(samples[pair.ours], other, pair.ratio(mode))
            goal, floor = pair.goals.get(mode, NONE), pair.floor_ms.get(mode)
            if pair.expected is not None and reading.other_ms is not None:
                floor = reading.other_ms * pair.expected
            result.append(
                TableRow(
                    f"{benchmark}: {pair.title()}",
                    mode,
                    reading.ours_ms,
                    reading.other_ms,
                    reading.ratio,
                    pair.better,
                    goal.target,
                    goal.aim,
                    reading.spread,
                    reading.cpu_ratio,
                    floor,
                    reading.rounds,
                    reading.busy,
                    pair.note,
                )
            )
        return result


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a benchmark is told when it is built."""

    device: str = "cpu"
    quick: bool = False
    """Shapes shrunk by `SHRINK`: for tests that it runs, not for figures."""
    peers: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    """Repositories by kind."""
    data: Path | None = None
    """A folder of shards of our documents."""

    SHRINK = 16

    def size(self, number: int) -> int:
        """A length or width of PERFORMANCE's shapes."""
        return max(16, number // self.SHRINK) if self.quick else number

    def peer(self, kind: str) -> Path:
        """Folder of a repository.

        Raises:
            Unavailable: it was not given.
        """
        if kind not in self.peers:
            raise Unavailable(f"needs a checkout of the repository: --peer {kind}=FOLDER")
        return self.peers[kind]

    def documents(self) -> Path:
        """The folder of shards.

        Raises:
            Unavailable: it was not given.
        """
        if self.data is None:
            raise Unavailable("needs a folder of shards with texts and pictures: --data FOLDER")
        return self.data


@dataclasses.dataclass(frozen=True)
class Benchmark:
    name: str
    device: str
    about: str
    build: Callable[[Settings], Group]


_benchmarks: dict[str, Benchmark] = {}


def benchmark(name: str, device: str = "cpu", **options: object) -> Callable[[Callable], Callable]:
    """Decorator: the function, given `Settings` and these options, builds the benchmark `name`. Its docstring's first
    paragraph is what `--list` says."""

    def add(function: Callable[..., Group]) -> Callable[..., Group]:
        about = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        _benchmarks[name] = Benchmark(name, device, about, functools.partial(function, **options))
        return function

    return add


def known(device: str | None = None) -> list[Benchmark]:
    """All benchmarks, or those of a device, by name."""
    return [found for _, found in sorted(_benchmarks.items()) if device in (None, found.device)]


def select(names: Sequence[str], device: str) -> list[Benchmark]:
    """Those whose names begin with one of `names`; all of the device without any.

    Raises:
        UserError: a name that begins none.
    """
    available = known(device)
    for name in names:
        if not any(found.name.startswith(name) for found in available):
            everywhere = [found.name for found in available]
            raise UserError(
                f"{name}: no benchmark on {device} begins so{suggestion(name, everywhere)}; known: "
                f"{', '.join(everywhere)}"
            )
    return [found for found in available if not names or any(found.name.startswith(name) for name in names)]


def goals(forward: Goal = NONE, both: Goal = NONE) -> dict[str, Goal]:
    return {FORWARD: forward, BOTH: both}


def leaf(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random values that want their gradient."""
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()
