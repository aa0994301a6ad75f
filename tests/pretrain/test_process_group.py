"""One process by itself, and who may import DeepSpeed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

from pretrain.process_group import Ranks, prepare_environment

ROOT = Path(__file__).parents[2]


def test_one_process_alone_needs_no_group() -> None:
    alone, tensor = Ranks(), torch.tensor([2.0])
    assert alone.first and not torch.distributed.is_initialized()
    assert alone.sum(tensor) is tensor and alone.max(tensor) is tensor and tensor == 2.0
    assert alone.broadcast([1]) == [1] and alone.gather("a") == ["a"]
    alone.barrier()


def test_deepspeed_is_imported_in_few_places() -> None:
    files = [path for floor in ("zoo", "pretrain", "tools") for path in (ROOT / floor).rglob("*.py")]
    pattern = re.compile(r"^\s*(import|from) deepspeed\b", re.MULTILINE)
    found = {str(path.relative_to(ROOT)) for path in files if pattern.search(path.read_text(encoding="utf-8"))}
    names = ("deepspeed_config", "deepspeed_patches", "engine", "process_group")
    assert found == {f"pretrain/{name}.py" for name in names}


def test_deterministic_kernels_are_asked_for_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        prepare_environment("cpu", deterministic=True)
        assert not torch.are_deterministic_algorithms_enabled()
        prepare_environment("cuda", deterministic=True)
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
