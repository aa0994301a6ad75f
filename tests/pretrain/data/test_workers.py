"""Indexing in processes and by parts: the same files as in one process, resumed by shard, errors that are told."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from pretrain.data import DataConfig, DataError, open_data, workers
from pretrain.data.cache import HIDDEN
from pretrain.data.opening import tokenize_part
from tests.pretrain.data.samples import IMAGE, TEXT, png, sample, write_shard
from zoo.modalities import parse_modalities

MODALITIES = {"text": TEXT, "image": IMAGE}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(5):
        documents = [sample(f"{shard}-{n}", f"text {n}", png(10 * shard + n)) for n in range(4)]
        write_shard(folder / f"train-{shard}.tar", [*documents, sample(f"{shard}-broken", b"no picture")])
    return folder


def config(folder: Path, cache: str, **changes) -> DataConfig:
    keys = {"path": str(folder), "cache": str(folder.parent / cache), "validation": None, "sequence_length": 32}
    return DataConfig.parse(keys | {"max_broken_documents": 9} | changes, "data")


def made(folder: Path, cache: str) -> dict[str, bytes]:
    """The files of tokens in a cache, but those that hold the time."""
    files = (path for path in (folder.parent / cache).glob("*.tokens/*") if path.name != "names.npz")
    return {str(path.relative_to(folder.parent / cache)): path.read_bytes() for path in files}


def test_processes_make_the_files_that_one_makes(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = parse_modalities(MODALITIES)
    one = open_data(config(shards, "one", workers=1), modalities, 0, lambda line: None)
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    two = open_data(config(shards, "two", workers=2), modalities, 0, lambda line: None)
    assert one.fingerprint == two.fingerprint
    assert made(shards, "one") == made(shards, "two") != {}


def test_parts_add_up_and_what_is_there_is_not_made_again(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = parse_modalities(MODALITIES)
    parts = config(shards, "parts")
    assert [tokenize_part(parts, modalities, part, 2, lambda line: None) for part in (1, 2)] == [3, 2]
    monkeypatch.setattr("pretrain.data.index.tokenize", None)
    data = open_data(parts, modalities, 0, lambda line: None)
    monkeypatch.undo()
    assert data.fingerprint == open_data(config(shards, "whole"), modalities, 0, lambda line: None).fingerprint


def test_indexing_goes_on_with_the_shards_that_are_missing(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = parse_modalities(MODALITIES)
    done: list[str] = []
    real = workers.tokenize_shard

    def interrupted(listing, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(listing.shard.name)
        real(listing, *rest)

    monkeypatch.setattr(workers, "tokenize_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_data(config(shards, HIDDEN), modalities, 0, lambda line: None)
    first, done[:] = list(done), []
    open_data(config(shards, HIDDEN), modalities, 0, lambda line: None)
    assert sorted(first + done) == [f"train-{n}.tar" for n in range(5)]


def test_an_error_of_a_process_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = parse_modalities({"text": TEXT, "image": {"type": "continuous_patches", "image_size": 8, "patch": 4}})
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    with open(shards / "train-4.tar", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(DataError, match=r"train-4.tar: the shard is truncated, it ends at byte 3000"):
        open_data(config(shards, "cut", workers=2), modalities, 0, lambda line: None)


def test_a_process_that_is_killed_is_told(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modalities = parse_modalities({"text": TEXT, "image": IMAGE})
    monkeypatch.setattr(workers, "PATIENCE", 0.0)
    start = workers._start

    def killed() -> subprocess.Popen[bytes]:
        process = start()
        os.kill(process.pid, signal.SIGKILL)
        return process

    monkeypatch.setattr(workers, "_start", killed)
    with pytest.raises(
        DataError, match="^data.workers: a process that tokenises has ended, .* set data.workers to less"
    ):
        open_data(config(shards, "killed", workers=2), modalities, 0, lambda line: None)
