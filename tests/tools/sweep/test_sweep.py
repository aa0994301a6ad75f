"""What sweeps of every kind have in common, seen at a kind that squares numbers."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
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
    accelerators: int = 1
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

    def preview(self, points: Sequence[Square]) -> str:
        return f"{len(points)} numbers"

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

    def kept(self, folder: Path) -> list[Path]:
        return [folder / "tries"]

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
    assert "a-7 failed, and is tried once more" in said.err and "a-1: not run, is odd and tiny" in said.err
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


def test_rows_of_finished_runs(tmp_path: Path) -> None:
    """What one machine has finished another does not repeat; both report the same."""
    rows, first, second = (tmp_path / name for name in ("rows", "first", "second"))
    assert command.run(Squares((2, 13)), first, rows=rows) == 1
    assert [path.name for path in rows.iterdir()] == ["a-2.json.gz"], "a failed run leaves nothing"
    content = (rows / "a-2.json.gz").read_bytes()
    (first / RUNS / "a-2" / "tries").write_text("a mark")
    (rows / "a-2.json.gz").unlink()
    command.run(Squares((2, 13)), first, only_report=True, rows=rows)
    assert (rows / "a-2.json.gz").exists(), "what was finished by other means is kept, too"
    assert command.run(Squares((2, 3)), second, rows=rows) == 0
    assert (second / RUNS / "a-2" / "tries").read_text() == "a mark" and (rows / "a-3.json.gz").exists()
    assert "| a | 2 | 4 |" in (second / "results.md").read_text()
    assert content != (rows / "a-2.json.gz").read_bytes()


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    command.run(Squares((2,)), tmp_path / "a", rows=rows)
    with pytest.raises(
        UserError, match="a-2.json.gz is of a run of that name with other settings.*\n  base: 'plain' t"
    ):
        command.run(Squares((2,), base="other"), tmp_path / "b", rows=rows)
    row = json.loads(gzip.decompress((rows / "a-2.json.gz").read_bytes()))
    (rows / "a-2.json.gz").write_bytes(gzip.compress(json.dumps(row | {"files": {"../x": ""}}).encode()))
    with pytest.raises(UserError, match="names a file outside the run's folder"):
        command.run(Squares((2,)), tmp_path / "c", rows=rows)
    (rows / "a-2.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="a-2.json.gz: cannot be read .*; restore it, or remove it"):
        command.run(Squares((2,)), tmp_path / "d", rows=rows)


SBATCH = """\
#!/usr/bin/env bash
# sbatch FILE: every task of its array, one after the other, here
set -eu
range=$(sed -n 's/^#SBATCH --array=\\([0-9]*\\)-\\([0-9]*\\)%[0-9]*$/\\1 \\2/p' "$1")
for task in $(seq $range); do SLURM_ARRAY_TASK_ID=$task bash "$1" || echo "task $task failed"; done
"""
SRUN = """\
#!/usr/bin/env bash
# srun [--option ...] COMMAND: here; --output is obeyed
set -eu
while [ "${1#--}" != "$1" ]; do case "$1" in --output=*) exec >> "${1#--output=}" 2>&1;; esac; shift; done
exec "$@"
"""


def test_a_job_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its script is right for bash, and leaves what a sweep run here leaves; finished runs are not in it again."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    sweep, out = Squares((2, 7, 3)), tmp_path / "with space" / "out"
    assert command.by_other_hands(sweep, out, slurm=True, jobs=2) == 0
    script = out / "sweep.sbatch"
    assert f"3 runs: sbatch {script}" in capsys.readouterr().out
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "#SBATCH --array=0-2%2\n" in script.read_text()
    said = subprocess.run(["sbatch", str(script)], check=True, capture_output=True, text=True).stdout
    assert said == "task 1 failed\n", "7 fails once"
    assert (out / RUNS / "a-2" / "log").read_text() == "number 2\n"
    command.by_other_hands(sweep, out, slurm=True, jobs=2)
    assert "#SBATCH --array=0-0%2\n" in script.read_text() and "a-7" in script.read_text()
    subprocess.run(["sbatch", str(script)], check=True, capture_output=True)
    assert command.run(sweep, out, only_report=True) == 0
    assert "| a | 7 | 49 |" in (out / "results.md").read_text()
    capsys.readouterr()
    command.by_other_hands(sweep, out, slurm=True, jobs=2)
    assert "every run is finished" in capsys.readouterr().out


def test_commands_to_be_given_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, out = Squares((2, 3)), tmp_path / "out"
    assert command.by_other_hands(sweep, out, slurm=False, jobs=1) == 0
    said = capsys.readouterr()
    assert said.err.startswith("2 numbers\n"), "what is to be known stands apart"
    first, second = said.out.splitlines()
    subprocess.run(first, shell=True, check=True, capture_output=True)
    assert (out / RUNS / "a-2" / RESULT).exists() and second.endswith(str(out / RUNS / "a-3"))
    command.by_other_hands(sweep, out, slurm=False, jobs=1)
    assert capsys.readouterr().out.splitlines() == [second]


def test_words_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text("type: pretrain\nrecipe: none.yaml\narms: {a: {}}\nmatch: {flops: 0}\n")
    for words, said in (
        (["one", "two"], "two: one folder is enough, and one is given already"),
        (["--jobs", "0", "recipe=sweep.yaml"], "--jobs: 0; at least one run must go on"),
        (["seeds=[1]"], "recipe: 'none.yaml' is not a file"),
    ):
        assert command.main([str(path), *words]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("said", ["", "type: adapted\n", "type: [adapt]\n"])
def test_the_kind_must_be_known(tmp_path: Path, said: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(said + "numbers: [1]\n")
    with pytest.raises(ConfigError, match="type: .* is not a kind of sweep; write type: KIND, one of adapt, pretrain"):
        open_sweep(path, [])
