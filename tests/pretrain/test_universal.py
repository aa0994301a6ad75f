"""A conversion is used only where every file of it is what it was, and it was made of this very checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.manifest import MANIFEST, read_manifest, write_manifest
from pretrain.universal import damage_of, universal_folder
from zoo.files import checksum


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with its conversion beside it."""
    source = tmp_path / "step-3"
    for folder in (source, universal_folder(source)):
        (folder / "engine").mkdir(parents=True)
        (folder / "engine" / "weights.pt").write_bytes(b"weights of " + folder.name.encode())
    write_manifest(source, {"step": 3}, {"engine/weights.pt": checksum(source / "engine" / "weights.pt")})
    seal(source)
    return source


def seal(source: Path) -> None:
    target = universal_folder(source)
    about = {"source": read_manifest(source).crc32}
    write_manifest(target, about, {"engine/weights.pt": checksum(target / "engine" / "weights.pt")})


def test_a_whole_one_and_none(source: Path) -> None:
    assert damage_of(source, 0, 1) == ""
    universal_folder(source).rename(source.with_name("away"))
    assert damage_of(source, 0, 1) == "it has not been made yet"


def test_one_of_another_checkpoint(source: Path) -> None:
    write_manifest(source, {"step": 3}, {})
    assert damage_of(source, 0, 1) == "it was made of another step-3"


def test_one_from_before_there_were_manifests(source: Path) -> None:
    (universal_folder(source) / MANIFEST).unlink()
    assert damage_of(source, 0, 1) == "its manifest.json cannot be read (No such file or directory)"


@pytest.mark.parametrize("name", ["engine/weights.pt", MANIFEST])
def test_every_bit_and_every_length(source: Path, name: str) -> None:
    path = universal_folder(source) / name
    content = path.read_bytes()
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert damage_of(source, 0, 1), (place, flipped)
    for length in range(len(content) - 1):
        path.write_bytes(content[:length])
        assert damage_of(source, 0, 1), length
    path.write_bytes(content)
    assert not damage_of(source, 0, 1)
