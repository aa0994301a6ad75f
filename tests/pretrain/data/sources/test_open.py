"""Whole runs of the data path over other formats: from a server, from a pipe, with losses named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.data import Data, DataConfig, open_data
from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.data.sources.serving import serve
from zoo.modalities import parse_modalities

MODALITIES = {
    "text": {"type": "bytes"},
    "image": {"type": "patches", "image_size": 8, "patch": 4, "codes": 4, "channels": 1},
}


def opened(log: list[str], cache: Path, **keys: Any) -> Data:
    config = DataConfig.parse({"sequence_length": 32, "cache": str(cache), "validation": None, **keys}, "data")
    return open_data(config, parse_modalities(MODALITIES), 0, log.append)


def rows(data: Data) -> list[list[int]]:
    """The tokens of an epoch."""
    return [data.train.row(n).tokens.tolist() for n in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of captioned pictures, the second compressed."""
    data = tmp_path / "data"
    data.mkdir()
    for shard in range(2):
        path = data / f"a-{shard:03}.tar"
        write_shard(path, [sample(f"{shard}-{n}", f"text {n}", png(10 * shard + n)) for n in range(6)])
    (data / "a-001.tar.gz").write_bytes(gzip.compress((data / "a-001.tar").read_bytes()))
    return data


def test_shards_from_a_server_and_from_pipes_are_those_on_disk_and_are_read_once(folder: Path, tmp_path: Path) -> None:
    local = opened([], tmp_path / "local", path=str(folder), train="a-*.tar")
    piped = f"pipe:cat {folder}/a-{{000..001}}.tar; echo run >> {tmp_path}/runs"
    again = opened([], tmp_path / "piped", path=piped)
    assert (tmp_path / "runs").read_text().split() == ["run"] * 2
    with serve(folder) as (address, asked):
        paths = [f"{address}/a-000.tar", f"{address}/a-001.tar.gz"]
        first = opened([], tmp_path / "served", path=paths)
        assert sorted(asked) == ["/a-000.tar", "/a-001.tar.gz"]
    second = opened([], tmp_path / "served", path=paths)  # the server is gone
    assert rows(local) == rows(again) == rows(first) == rows(second)
    assert local.fingerprint == again.fingerprint == first.fingerprint == second.fingerprint
    for cache in ("piped", "served"):
        assert not list((tmp_path / cache / "copies").iterdir())


def test_formats_are_the_documents_that_they_hold(folder: Path, tmp_path: Path) -> None:
    pairs = [(f"text {n}", png(10 * shard + n)) for shard in range(2) for n in range(6)]
    for n, (_, picture) in enumerate(pairs):
        (tmp_path / f"{n}.png").write_bytes(picture)
    lines = [json.dumps({"caption": text, "image": f"{n}.png"}) for n, (text, _) in enumerate(pairs)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    ours = opened([], tmp_path / "ours", path=str(folder), train="a-*.tar")
    captions = {"captions": {"type": "captions", "path": str(tmp_path / "x.jsonl")}}
    theirs = opened([], tmp_path / "theirs", sources=captions)
    assert rows(ours) == rows(theirs)


def test_what_is_left_out_of_documents_is_counted_also_from_the_cache(tmp_path: Path) -> None:
    images = ["https://a.b/c.png", None, "none.png", None]
    record = {"texts": [None, "words", None, "more"], "images": images}
    (tmp_path / "x.jsonl").write_text("\n".join([json.dumps(record)] * 3))
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "y.jsonl").write_text(json.dumps({"texts": [None], "images": ["0.png"]}))
    for _ in range(2):
        log: list[str] = []
        opened(log, tmp_path / "cache", sources={"pages": {"type": "interleaved", "path": str(tmp_path)}})
        assert (
            "left out of documents that are used:\n"
            "  3 × image is a URL that nobody has fetched, such as x.jsonl: x-00000000: https://a.b/c.png\n"
            "  3 × image is not in the folder, such as x.jsonl: x-00000000: none.png"
        ) in log
