"""The cache's lock, and what a killed process left under it."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.cache import locked


def test_leftovers_go_once_the_lock_is_held(tmp_path: Path) -> None:
    for name in ("a.npz.12.writing", "a.npz"):
        (tmp_path / name).write_text("")
    with locked(tmp_path, log=lambda line: None):
        assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "lock"}
