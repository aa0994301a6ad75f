"""Files that are whole or not there: what a writer leaves when it ends well, raises, or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from zoo.files import atomic_path, atomic_write, checksum, remove_leftovers


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_last_content_stands_alone(tmp_path: Path) -> None:
    for content in ("ärger\n", b"\x00\xff"):
        atomic_write(tmp_path / "a.txt", content)
        wanted = content.encode() if isinstance(content, str) else content
        assert (tmp_path / "a.txt").read_bytes() == wanted
        assert checksum(tmp_path / "a.txt") == zlib.crc32(wanted)
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_path(tmp_path / "model") as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).write_text(name)
    assert names(tmp_path) == ["model"] and names(tmp_path / "model" / "inner") == ["new"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_raises_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    atomic_write(tmp_path / "a", "before")
    with pytest.raises(type(error)), atomic_path(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_everything_is_on_the_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own list of names too, after it."""
    told: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(handle: int) -> None:
        told.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.replace(str(os.getpid()), "PID"))
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        told.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic_write(tmp_path / "a", "text")
    assert told == ["a.PID.writing", "rename", tmp_path.name]
    told.clear()
    with atomic_path(tmp_path / "b") as temporary:
        temporary.mkdir()
        (temporary / "inner").write_text("")
    assert told == ["inner", "b.PID.writing", "rename", tmp_path.name]


def test_what_a_killed_writer_leaves_is_found_by_its_exact_name(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "before")
    code = (
        "import os, sys; from pathlib import Path; from zoo.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as path: path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")]).returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 2 and (tmp_path / "a").read_text() == "before"
    others = ["a.writing", "a.tmp", "notes.12.writing.bak", "b.x.writing", ".12.writing"]
    for name in others:
        (tmp_path / name).write_text("kept")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(["a", *others])
