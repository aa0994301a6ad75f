"""The check of a GPU, as far as a CPU can run it: parts, limits, going on, the page."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from tests.pretrain.runs import ROOT
from tools.gpu_check import __main__ as command
from tools.gpu_check.parts import PARTS, CheckPart, select
from tools.gpu_check.runner import Runner
from tools.gpu_check.synchronisation import RECIPES, WAITS
from zoo.config import UserError

PASSES = CheckPart("passes", "a part that passes", ("-c", "print('all well')"), 60)
FAILS = CheckPart("fails", "a part that fails", ("-c", "print('not well'); raise SystemExit(3)"), 60)
HANGS = CheckPart("hangs", "a part that never ends", ("-c", "import time; time.sleep(600)"), 2)


def states(folder: Path) -> dict[str, str]:
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return {name: outcome["state"] for name, outcome in results.items()}


def test_every_part_ends_and_is_on_the_page(tmp_path: Path) -> None:
    parts = [PASSES, FAILS, HANGS]
    assert Runner(tmp_path, 120, device="cpu").run(parts) == 1
    assert states(tmp_path) == {"passes": "passed", "fails": "failed", "hangs": "timed out"}
    page = (tmp_path / "gpu_check.md").read_text(encoding="utf-8")
    for part in parts:
        assert f"| {part.name} | {states(tmp_path)[part.name]} |" in page
    assert "all well" in page and torch.__version__.partition("+")[0] in page


def test_what_has_passed_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Runner(tmp_path, 120, device="cpu").run([PASSES, FAILS])
    capsys.readouterr()
    Runner(tmp_path, 120, device="cpu").run([PASSES, FAILS])
    said = capsys.readouterr().out
    assert "passes: passed before" in said and "fails: failed" in said


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    assert Runner(tmp_path, 1, device="cpu").run([PASSES]) == 1
    assert states(tmp_path) == {"passes": "not run"}


def test_parts_by_name(tmp_path: Path) -> None:
    assert [part.name for part in select(["doctor"])] == ["doctor"]
    with pytest.raises(UserError, match="--only docter: not known; .*did you mean 'doctor'"):
        select(["docter"])
    assert len({part.name for part in PARTS}) == len(PARTS)
    assert PARTS[4].command(tmp_path)[-2:] == ["--json", str(tmp_path / "blocks.json")]
    files = [argument for part in PARTS for argument in part.arguments if argument.endswith(".py")]
    assert files and all((ROOT / file).is_file() for file in files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_machine_without_a_gpu_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_recipes_that_may_synchronise_exist() -> None:
    assert set(WAITS) <= {path.stem for path in RECIPES.glob("*.yaml")}


def test_the_scripts_are_shell() -> None:
    for script in (ROOT / "tools" / "gpu_check").glob("*.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)
