"""`python -m tools.check`: valid recipes with their figures, wrong ones with the message of the training command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.runs import write_recipe
from tools.check import main


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return write_recipe(tmp_path, "nowhere", tmp_path / "run")


def test_valid(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--ranks", "2", "train.global_batch=16"]) == 0
    printed = capsys.readouterr().out
    assert f"{file}: valid. " in printed
    assert "ZeRO stage 2, fp32 on cpu, 2 rank(s), 4 micro-batch(es) a step" in printed
    assert not (file.parent / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stps=1", "train.stps: unknown key"),
        ("train.micro_batch=4", "train.global_batch: 4 is not a multiple of train.micro_batch × ranks = 4 × 2 = 8"),
        ("deepspeed.zero_optimization.overlap_comm=maybe", "overlap_comm: 'maybe': must be a valid boolean"),
    ],
)
def test_wrong(file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert main([str(file), override, "--ranks", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
