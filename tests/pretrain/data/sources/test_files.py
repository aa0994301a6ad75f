"""Paths, URLs and pipes: which files they mean, and that each is read once, whole, or named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.data.errors import DataError
from pretrain.data.sources.files import Shard, find_files
from tests.pretrain.data.sources.serving import serve


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A few small files, one of them hidden."""
    for name in ("a-0.txt", "a-1.txt", "b.md", "below/c.txt", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "names", "found"),
    [
        ("", "*.txt", ["a-0.txt", "a-1.txt"]),
        ("", "**/*.{txt,md}", ["a-0.txt", "a-1.txt", "b.md", "below/c.txt"]),
        ("a-{1..0}.txt", "*", ["a-1.txt", "a-0.txt"]),
        ("a-*.txt", "*", ["a-0.txt", "a-1.txt"]),
        ("b.md", "*.txt", ["b.md"]),
    ],
)
def test_paths(tree: Path, path: str, names: str, found: list[str]) -> None:
    assert find_files(str(tree / path), names) == [str(tree / each) for each in found]


def test_several_paths_name_a_file_once(tree: Path) -> None:
    assert find_files([f"{tree}/b.md", str(tree)], "*") == [f"{tree}/{name}" for name in ("b.md", "a-0.txt", "a-1.txt")]


def test_a_path_that_leads_nowhere_is_named(tree: Path) -> None:
    with pytest.raises(DataError, match=r"^path: '.*a-7.txt' leads to no file \(looked for from .*\)"):
        find_files(f"{tree}/a-{{0,7}}.txt", "*")


def test_a_pipe_is_read_once(tree: Path) -> None:
    shard = Shard(f"pipe:echo x >> {tree}/runs; gzip -c {tree}/b.md")
    assert shard.local(tree) == shard.local(tree)
    assert shard.local(tree).read_text() == "b.md" and (tree / "runs").read_text() == "x\n"
    shard.release(tree)
    assert list((tree / "copies").iterdir()) == []


@pytest.mark.parametrize("command", ["cat nowhere", "cat nowhere | cat"])
def test_a_pipe_that_fails_is_named(tmp_path: Path, command: str) -> None:
    with pytest.raises(DataError, match=r"^pipe:cat nowhere.*: ends with exit status 1 \(cat: nowhere: No such file"):
        Shard(f"pipe:{command}").local(tmp_path)
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.fixture
def server(tree: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of the tree, and the paths that it was asked for."""
    with serve(tree) as served:
        yield served


def test_a_url_is_read_once(server: tuple[str, list[str]], tree: Path) -> None:
    address, asked = server
    urls = find_files(f"{address}/a-{{0..1}}.txt", "*")
    assert asked == []
    for _ in range(2):
        assert [Shard(url).local(tree).read_text() for url in urls] == ["a-0.txt", "a-1.txt"]
    assert asked == ["/a-0.txt", "/a-1.txt"]
    with pytest.raises(DataError, match=r"^http://.*/nothing: cannot be read \(.*; correct the path$"):
        Shard(f"{address}/nothing").local(tree)
