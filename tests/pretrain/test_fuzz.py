"""Whatever a recipe holds, checking it says what is wrong in a few words, in little time, and never with a
traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.pretrain.fuzzing import case
from tests.pretrain.runs import ROOT
from tools.check import main

SHORT, LONG = 150, 10_000


def check(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `tools.check` says; "" where the recipe is valid."""
    began = time.monotonic()
    code = main(arguments)
    printed = capsys.readouterr()
    assert time.monotonic() - began < 20
    assert (code, bool(printed.out)) in ((0, True), (2, False))
    assert code == 0 or (printed.err.startswith("error: ") and len(printed.err) < 20_000)
    return printed.err


def run(numbers: range, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Check the cases of these numbers; returns how many recipes are valid."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(ROOT)
    path, valid = folder / "recipe.yaml", 0
    for number in numbers:
        fuzzed = case(number)
        path.write_text(fuzzed.text, encoding="utf-8", errors="surrogatepass")
        try:
            valid += not check([str(path), *fuzzed.overrides], capsys)
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}"[:1000]) from error
    return valid


def test_some(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.03 * SHORT < run(range(SHORT), tmp_path, capsys, monkeypatch) < 0.6 * SHORT


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(range(LONG), tmp_path, capsys, monkeypatch) > 0
