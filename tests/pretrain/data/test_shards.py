"""Shards that are whole, and every way in which one is not: one clear error that names the file."""

import io
import tarfile

import pytest

from pretrain.data.errors import DataError
from pretrain.data.shards import Entry, Member, find_shards, scan_shard
from tests.pretrain.data.samples import sample, write_shard


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "x-train.tar", [sample(f"{n:03d}", f"text {n}", bytes(700)) for n in range(10)])


def header_offset(shard, number: int) -> int:
    with tarfile.open(shard) as tar:
        return tar.getmembers()[number].offset


def test_offsets_lead_to_the_content(shard):
    entries = scan_shard(shard)
    assert [entry.key for entry in entries] == [f"{n:03d}" for n in range(10)]
    content = shard.read_bytes()
    with tarfile.open(shard) as tar:
        for entry in entries:
            for member in entry.members:
                expected = tar.extractfile(f"{entry.key}.{member.extension}").read()
                assert content[member.offset : member.offset + member.size] == expected


def test_members_of_a_document_need_not_be_neighbours_and_the_last_of_a_name_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, size in [("a.json", 3), ("b.json", 4), ("README", 5), ("a.0.png", 6), ("b.json", 7)]:
            info = tarfile.TarInfo(name)
            info.size = size
            tar.addfile(info, io.BytesIO(bytes(size)))
    first, second = scan_shard(tmp_path / "x.tar")
    assert first.key == "a" and [m.extension for m in first.members] == ["json", "0.png"]
    assert second.find("json").size == 7


def test_find_takes_the_last_of_a_name():
    entry = Entry("a", (Member("json", 0, 1), Member("json", 9, 2)))
    assert entry.find("json").offset == 9
    assert entry.find("png") is None


def test_shards_are_sorted_and_missing_ones_named(tmp_path, shard):
    write_shard(tmp_path / "a-train.tar", [])
    assert [path.name for path in find_shards(tmp_path, "*train*.tar", "data.train")] == [
        "a-train.tar",
        "x-train.tar",
    ]
    with pytest.raises(
        DataError, match=r"^data.train: no shard in '.*' matches 'z\*'; it holds a-train.tar, x-train.tar"
    ):
        find_shards(tmp_path, "z*", "data.train")
    with pytest.raises(DataError, match="^data.path: .* is not a folder"):
        find_shards(tmp_path / "nowhere", "*", "data.train")


def test_empty_file(tmp_path):
    (tmp_path / "x.tar").touch()
    with pytest.raises(DataError, match=r"x.tar: the shard is empty \(0 bytes\)"):
        scan_shard(tmp_path / "x.tar")


def test_tar_without_documents(tmp_path):
    with pytest.raises(DataError, match="x.tar: the shard holds no document"):
        scan_shard(write_shard(tmp_path / "x.tar", []))


@pytest.mark.parametrize("content", [b"\x1f\x8b" + bytes(2000), b"no tar at all" * 100])
def test_not_a_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(DataError, match="x.tar: not a plain tar file"):
        scan_shard(tmp_path / "x.tar")


@pytest.mark.parametrize("place", ["in content", "in a header", "before a header", "before the end marker"])
def test_truncated(shard, place):
    offset = header_offset(shard, 11)
    size = {"in content": offset + 800, "in a header": offset + 100, "before a header": offset}
    with tarfile.open(shard) as tar:
        tar.getmembers()
        size["before the end marker"] = tar.offset
    with open(shard, "r+b") as file:
        file.truncate(size[place])
    with pytest.raises(DataError, match=rf"x-train.tar: the shard is truncated, it ends at byte {size[place]} "):
        scan_shard(shard)


def test_damaged_header_in_mid_shard_is_not_silent(shard):
    offset = header_offset(shard, 8)
    with open(shard, "r+b") as file:
        file.seek(offset + 20)
        file.write(b"\xff\xff\xff\xff")
    with tarfile.open(shard) as tar:
        assert len(tar.getmembers()) == 8  # what makes the check necessary
    with pytest.raises(DataError, match=rf"x-train.tar: damaged header at byte {offset}, .* write it again"):
        scan_shard(shard)
