"""Our own documents as a source: what it lists and reads, from plain and compressed tar files."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from pretrain.data.errors import BrokenDocument, DataError
from pretrain.data.shards import find_shards
from pretrain.data.sources import Document, Source
from pretrain.data.sources.files import find_files
from tests.pretrain.data.samples import png, sample, write_shard
from zoo.config import ConfigError
from zoo.registry import parse_block


def read(document: Document) -> list[tuple[str, bytes]]:
    """Type and bytes of each part."""
    return [(part.type, part.read()) for part in document.contents().parts]


def source(**keys: object) -> Source:
    config = parse_block("source", {"type": "documents", **keys}, "data.source")
    return config.block(config)


def test_documents_in_order_and_by_number(tmp_path: Path) -> None:
    write_shard(tmp_path / "b.tar", [sample("1", "x")])
    write_shard(tmp_path / "a.tar", [sample(f"{n}", f"text {n}", png(n)) for n in range(5)])
    from_folder = source(path=str(tmp_path))
    first, second = from_folder.shards()
    assert [first.name, second.name] == ["a.tar", "b.tar"]
    with from_folder.open(first, tmp_path) as documents:
        assert [document.key for document in documents] == list("01234")
        assert read(documents[3]) == [("text", b"text 3"), ("image", png(3))]


def test_a_compressed_shard_is_the_same_through_a_copy(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [sample("0", "x", png(0))])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    (tmp_path / "cache").mkdir()
    both = source(path=str(tmp_path))
    plain, packed = both.shards()
    assert both.identity(plain, tmp_path / "cache") == both.identity(packed, tmp_path / "cache")
    with both.open(packed, tmp_path / "cache") as documents:
        assert read(documents[0]) == [("text", b"x"), ("image", png(0))]
    assert len(list((tmp_path / "cache" / "copies").iterdir())) == 1
    packed.release(tmp_path / "cache")
    assert list((tmp_path / "cache" / "copies").iterdir()) == []


def test_a_pattern_of_tar_files_means_compressed_ones_too(tmp_path: Path) -> None:
    for name in ("a-train", "b-train"):
        write_shard(tmp_path / f"{name}.tar", [sample(name, "x")])
        (tmp_path / f"{name}.tar.gz").write_bytes(gzip.compress((tmp_path / f"{name}.tar").read_bytes()))
    (tmp_path / "b-train.tar").unlink()
    assert [path.name for path in find_shards(tmp_path, "*train*.tar", "")] == ["a-train.tar", "b-train.tar.gz"]
    assert find_files(str(tmp_path), "*.tar") == [str(path) for path in find_shards(tmp_path, "*.tar", "")]


def test_a_compressed_shard_that_ends_early_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [sample("0", "x", png(0))])
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes())[:-9])
    packed = source(path=str(tmp_path / "b.tar.gz"))
    with pytest.raises(DataError, match=r"b\.tar\.gz: is truncated or damaged .*; copy or write it again$"):
        packed.identity(packed.shards()[0], tmp_path)
    assert list((tmp_path / "copies").iterdir()) == []


def test_the_identity_of_other_formats_is_what_their_documents_say(tmp_path: Path) -> None:
    ours = source(path=str(write_shard(tmp_path / "a.tar", [sample("0", "x", png(0)), sample("1", json=b"{")])))
    again = source(
        path=str(write_shard(tmp_path / "b.tar", [sample("0", "x", png(0), more=b""), sample("1", json=b"{")]))
    )
    other = source(path=str(write_shard(tmp_path / "c.tar", [sample("0", "x", png(1)), sample("1", json=b"{")])))
    first, same, different = (Source.identity(each, each.shards()[0], tmp_path) for each in (ours, again, other))
    assert first == same != different
    with ours.open(ours.shards()[0], tmp_path) as documents, pytest.raises(BrokenDocument, match="its JSON is not"):
        documents[1].contents()


def test_a_wrong_config_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^data.source.path: '': must be a path, or a list of paths$"):
        source(path="")
    with pytest.raises(ConfigError, match=r"^data.source.type: 'document' is not known; known: .*did you mean"):
        parse_block("source", {"type": "document", "path": "x"}, "data.source")
