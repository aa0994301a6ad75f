"""Manifests: what is sealed is found again, and everything that happened to it since is named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from pretrain.manifest import MANIFEST, DamageError, read_manifest, write_manifest
from zoo.files import checksum

FILES = {"a": b"alpha", "inner/b": b"beta"}


def sealed(folder: Path) -> Path:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, {"loss": math.nan, "of": ["ä"]}, {name: checksum(folder / name) for name in FILES})
    return folder


def test_what_is_sealed_holds(tmp_path: Path) -> None:
    manifest = read_manifest(sealed(tmp_path))
    manifest.check_sizes(tmp_path)
    manifest.check_contents(tmp_path)
    assert math.isnan(manifest.about["loss"]) and manifest.about["of"] == ["ä"]
    assert {name: entry.bytes for name, entry in manifest.files.items()} == {"a": 5, "inner/b": 4}
    assert manifest.crc32 != dataclasses.replace(manifest, about={}).crc32


def test_each_rank_reads_its_share(tmp_path: Path) -> None:
    manifest = read_manifest(sealed(tmp_path))
    (tmp_path / "inner" / "b").write_bytes(b"beth")
    manifest.check_contents(tmp_path, 0, 2)
    with pytest.raises(DamageError, match="inner/b does not have the checksum"):
        manifest.check_contents(tmp_path, 1, 2)


def test_a_file_that_is_missing_or_cut(tmp_path: Path) -> None:
    manifest = read_manifest(sealed(tmp_path))
    (tmp_path / "a").write_bytes(b"alp")
    with pytest.raises(DamageError, match="a has 3 bytes, its manifest says 5"):
        manifest.check_sizes(tmp_path)
    (tmp_path / "a").unlink()
    with pytest.raises(DamageError, match=r"a cannot be read \(No such file or directory\)"):
        manifest.check_sizes(tmp_path)


def test_a_manifest_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(DamageError, match="is not one that this library writes"):
        read_manifest(tmp_path)
