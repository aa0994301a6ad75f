"""What sweeps of every kind have in common, seen at a kind that squares numbers."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tools.sweep import __main__ as command
from tools.sweep import launch
from tools.sweep.folder import RESULT, RUNS
from tools.sweep.kind import Result, Sweep
from tools.sweep.kinds import open_sweep
from tools.sweep.report import problems, table, unfinished
from tools.sweep.rows import gather
from zoo.config import ConfigError, UserError

RUN = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
tries = len((folder / "tries").read_text()) if (folder / "tries").exists() else 0
(folder / "tries").write_text("x" * (tries + 1))
number = json.loads((folder / "point.json").read_text())["number"]
print("number", number)
if tries < {"13": 9, "7": 1}.get(str(number), 0):
    sys.exit("no luck")
(folder / "result.json").write_text(json.dumps({"square": number**2}))
"""
"""One run: 7 fails once, 13 always."""


@dataclasses.dataclass(frozen=True)
class Square:
    arm: str
    number: int
    seed: int = 0
    problem: str = ""
    same_as: str = ""

    @property
    def setting(self) -> str:
        return str(self.number)

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.number}"


@dataclasses.dataclass(frozen=True)
class Squares:
    """A kind of sweep in all that it must be."""

    numbers: tuple[int, ...]
    base: str = "plain"
    type: ClassVar[str] = "squares"
    free_settings: ClassVar[frozenset[str]] = frozenset({"remark"})
    jobs: int = 2
    measured: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, data: Mapping[str, Any], folder: Path) -> Squares:
        return cls(tuple(data["numbers"]))

    def shared(self) -> dict[str, Any]:
        return {"base": self.base}

    def plan_key(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers)}

    def plan(self, out: Path) -> Sequence[Square]:
        first = {number: place for place, number in reversed(list(enumerate(self.numbers)))}
        return [
            Square("a", n, problem="is odd and tiny" if n == 1 else "")
            if place == first[n]
            else Square("b", n, same_as=f"a-{n}")
            for place, n in enumerate(self.numbers)
        ]

    @staticmethod
    def read_point(data: Mapping[str, Any]) -> Square:
        return Square(**data)

    def settings(self, point: Square, folder: Path) -> dict[str, Any]:
        return {"number": point.number, "base": self.base, "remark": len(self.numbers)}

    def discard(self, folder: Path) -> None:
        (folder / "tries").unlink(missing_ok=True)

    @classmethod
    def run(cls, folder: Path, settings: dict[str, Any]) -> Result:
        return {"square": settings["number"] ** 2}

    def summary(self, result: Result) -> str:
        return f"square {result['square']}"

    def measure(self, points: Sequence[Square], out: Path) -> None:
        self.measured.append("once")

    def report(self, points: Sequence[Square], out: Path) -> list[Path]:
        rows = gather(points, out)
        lines = [
            [row.arm, row.setting, ", ".join(f"{square:g}" for square in row.each(lambda r: r["square"]))]
            for row in rows
        ]
        text = [table(["arm", "number", "square"], lines), *unfinished(rows), *problems(rows)]
        (out / "results.md").write_text("\n\n".join(text))
        return [out / "results.md"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    monkeypatch.setattr(launch, "command", lambda sweep, folder: [sys.executable, str(script), str(folder)])


def test_a_sweep_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Expanded, run side by side, tried once more, gathered, reported; then nothing is left to do."""
    sweep: Sweep[Square] = Squares((2, 7, 1, 2))
    out = tmp_path / "out"
    assert command.run(sweep, out) == 0
    said = capsys.readouterr()
    assert "a-7 failed, and is tried once more" in said.err and "a-1: not run, is odd and tiny" in said.out
    assert (out / "results.md").read_text() == (
        "| arm | number | square |\n|---|---|---|\n| a | 2 | 4 |\n| a | 7 | 49 |\n| a | 1 |  |\n| b | 2 | 4 |\n\n"
        "- a-1: not run, is odd and tiny."
    )
    assert sweep.measured == ["once"] and sorted(each.name for each in (out / RUNS).iterdir()) == ["a-2", "a-7"]
    assert command.run(sweep, out) == 0
    assert {each.name: (each / "tries").read_text() for each in (out / RUNS).iterdir()} == {"a-2": "x", "a-7": "xx"}


def test_a_run_that_fails_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = Squares((13, 3)), tmp_path / "out"
    assert command.run(sweep, out) == 1
    said = capsys.readouterr()
    assert "a-13 failed:\n  number 13\n  no luck\n  number 13\n  no luck" in said.err
    assert (out / RUNS / "a-3" / RESULT).exists() and not sweep.measured, "nothing is timed while runs are missing"
    assert "Not finished yet: a-13." in (out / "results.md").read_text()


def test_what_a_folder_holds_must_fit(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command.run(Squares((3,)), out)
    with pytest.raises(UserError, match="belongs to another sweep.*\n  base: 'plain' there, 'other' here"):
        command.run(Squares((3,), base="other"), out)
    assert command.run(Squares((3, 2)), out) == 0, "a remark may change"
    point = out / RUNS / "a-3" / "point.json"
    point.write_text(json.dumps(json.loads(point.read_text()) | {"number": 4}))
    with pytest.raises(UserError, match="a-3 holds a run of that name with another number; name the arm anew"):
        command.run(Squares((3, 2)), out)


def test_settings_that_change_before_a_run_is_finished(tmp_path: Path) -> None:
    """What an unfinished run left under others is discarded."""
    out = tmp_path / "out"
    assert command.run(Squares((13,)), out) == 1
    folder = out / RUNS / "a-13"
    (folder / "point.json").write_text(json.dumps({"number": 12, "base": "plain", "remark": 1}))
    command.run(Squares((13,)), out, only_report=True)
    assert not (folder / "tries").exists()


@pytest.mark.parametrize("said", ["", "type: adapted\n", "type: [adapt]\n"])
def test_the_kind_must_be_known(tmp_path: Path, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(said + "numbers: [1]\n")
    with pytest.raises(ConfigError, match="type: .* is not a kind of sweep; write type: KIND, one of adapt"):
        open_sweep(path, [])
