"""The cache's lock, and what a killed process left under it."""

from __future__ import annotations

import concurrent.futures
import time
from pathlib import Path

import pytest

from pretrain.data import cache
from pretrain.data.cache import locked, writing


def test_leftovers_go_once_the_lock_is_held(tmp_path: Path) -> None:
    for name in ("a.npz.12.writing", "a.npz"):
        (tmp_path / name).write_text("")
    with locked(tmp_path, log=lambda line: None):
        assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "lock", "writers"}


def test_leftovers_stay_while_somebody_else_is_writing(tmp_path: Path) -> None:
    """The shares of several machines are written without the lock."""
    (tmp_path / "a.npz.12.writing").touch()
    with writing(tmp_path), locked(tmp_path, log=lambda line: None):
        assert (tmp_path / "a.npz.12.writing").exists()
    with locked(tmp_path, log=lambda line: None):
        assert not (tmp_path / "a.npz.12.writing").exists()


def test_those_that_wait_are_told_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "PAUSE", 0.05)
    lines: list[str] = []
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with locked(tmp_path, log=lambda line: None) as waiting:
            other = pool.submit(lambda: locked(tmp_path, lines.append).__enter__())
            while len(lines) < 3:
                time.sleep(0.02)
                waiting.tell("3 of 9 shards")
            while "still waiting: 3 of 9 shards" not in lines:
                time.sleep(0.02)
        other.result(timeout=10)
    assert lines[0] == f"waiting for another process that is indexing into {tmp_path}"
