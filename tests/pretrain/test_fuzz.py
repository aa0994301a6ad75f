"""Whatever a recipe holds, checking it says what is wrong in a few words, in little time, and never with a
traceback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pretrain.finetune.recipe import load
from tests.pretrain.fuzzing import Case, case
from tests.pretrain.runs import ROOT
from tools.check import main
from zoo.config import ConfigError

SHORT, LONG, PARTS = 150, 10_000, 10


def check(path: Path, case: Case, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the recipe is valid; what is wrong with one that is not is said in bounded words and time."""
    began, message = time.monotonic(), ""
    if case.finetuning:
        try:
            load(path, case.overrides)
        except ConfigError as error:
            message = f"error: {error}"
    else:
        code = main([str(path), *case.overrides])
        printed = capsys.readouterr()
        message = printed.err
        assert (code, bool(printed.out)) in ((0, True), (2, False))
    assert time.monotonic() - began < 60 and len(message) < 20_000
    assert not message or message.startswith("error: ")
    return not message


def run(numbers: range, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Check the cases of these numbers; returns how many recipes are valid."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(ROOT)
    path, valid = folder / "recipe.yaml", 0
    for number in numbers:
        fuzzed = case(number)
        path.write_text(fuzzed.text, encoding="utf-8", errors="surrogatepass")
        try:
            valid += check(path, fuzzed, capsys)
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}"[:1000]) from error
    return valid


def test_some(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.03 * SHORT < run(range(SHORT), tmp_path, capsys, monkeypatch) < 0.6 * SHORT


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(PARTS))
def test_many(part: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(range(part, LONG, PARTS), tmp_path, capsys, monkeypatch) > 0
