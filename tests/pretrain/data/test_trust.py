"""Documents that must not end a run, failures that must not be remembered, and identity that is content alone."""

import errno
import io
import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pretrain import recipe as recipes
from pretrain.data import DataConfig, DataError, open_data
from pretrain.data.cache import HIDDEN
from pretrain.data.strings import Strings
from tests.pretrain.data.samples import IMAGE, TEXT, documents, keys, png, sample, small_files, write_shard
from zoo.modalities import parse_modalities
from zoo.modalities.pictures import open_picture


def opened(config: DataConfig, log=lambda line: None, image=IMAGE, **changes):
    modalities = parse_modalities({"text": TEXT, "image": image})
    return open_data(config.model_copy(update=changes), modalities, seed=0, log=log)


def size_of_index(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder / HIDDEN).iterdir())


# ------------------------------------------------------------------------------------------------------ odd documents


@pytest.mark.parametrize(
    "parts, reason",
    [
        ('[{"type": ["text"]}]', r"part 0 has type \['text'\]"),
        ('[{"type": {}}]', "part 0 has type {}"),
        ("[" * 1000 + "]" * 1000, "its JSON is not .* .RecursionError"),
        (f'[{{"type": {"[" * 900 + "]" * 900}}}]', "part 0 has type|nested too deeply|RecursionError"),
        ("[" * 200_000 + "]" * 200_000, "its JSON is not .* .RecursionError"),
        (f'[{{"type": "{"x" * 3_000_000}"}}]', r"part 0 has type 'x+… .3,000,002 characters.; known"),
        (f'[{{"type": "image", "file": "{"x" * 3_000_000}"}}]', "its file odd.x+… .3,000,004 characters. is missing"),
        ('[{"type": "image", "file": ["0.png"]}]', 'names no "file"'),
        ('[{"type": "text", "text": 9}]', 'has no string "text"'),
    ],
    ids=["list", "mapping", "nested", "nested type", "deep", "long type", "long file", "files", "number"],
)
def test_an_odd_document_is_skipped(config, folder, parts, reason):
    opened(config)
    before = size_of_index(folder)
    write_shard(folder / "b-train-0.tar", [{"__key__": "odd", "json": f'{{"parts": {parts}}}'.encode()}])
    lines: list[str] = []
    data = opened(config, lines.append, max_broken_documents=1)
    (skipped,) = data.skipped
    assert skipped.key == "odd" and re.search(reason, skipped.reason)
    assert len(documents(data)) == 10 and size_of_index(folder) < before + 10_000
    assert sum(map(len, lines)) < 2_000


def test_a_long_key_costs_its_own_length(tmp_path):
    def index(names: list[str]) -> int:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        (tmp_path / "data").mkdir()
        with tarfile.open(tmp_path / "data" / "train.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            for key in names:
                content = b'{"parts": [{"type": "text", "text": "x"}]}'
                info = tarfile.TarInfo(f"{key}.json")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        config = DataConfig.parse({"path": str(tmp_path / "data"), "sequence_length": 16, "validation": None}, "data")
        data = open_data(config, parse_modalities({"text": TEXT}), 0, lambda line: None)
        assert keys(data) == names
        return size_of_index(tmp_path / "data")

    short = [f"{n:05}" for n in range(500)]
    assert index([*short, "u" * 100_000]) < index(short) + 2 * 100_000 + 5_000


def test_strings_hold_whatever_a_name_may_be():
    values = ["", "a", "ü漢🙂", "G\udce8ve", "\ud83d", "x" * 9]
    packed = Strings.pack(values)
    assert packed.tolist() == values and len(packed) == 6
    assert Strings.named("k", packed.arrays("k")).tolist() == values
    assert Strings.join([Strings.pack([]), packed, packed]).tolist() == values * 2 and not len(Strings.join([]))


def test_pictures_with_too_many_pixels_are_counted(config, folder):
    write_shard(folder / "b-train-0.tar", [sample("bomb", png(0, side=1200))])
    data = opened(config, image=IMAGE | {"max_megapixels": 1}, max_broken_documents=1)
    reason = "has 1,200 × 1,200 pixels; modalities.image.max_megapixels allows 1,000,000"
    assert reason in data.skipped[0].reason and data.skipped[0].key == "bomb"
    assert not opened(config, image=IMAGE | {"max_megapixels": 2}).skipped


# -------------------------------------------------------------------------------------------------- reasons that show


def test_where_no_picture_is_usable_the_reasons_are_shown(config, folder):
    write_shard(folder / "a-train-0.tar", [sample("a", b"no picture"), sample("b", b"neither")])
    message = "(?s)^modalities.image: no document has a usable image to learn from; 2 documents cannot be used, such as"
    with pytest.raises(DataError, match=message + ".*a-train-0.tar: a: 0.png does not decode .UnidentifiedImageError"):
        opened(config)


def test_a_folder_of_img2dataset_says_what_it_is(config, folder):
    captioned = {"json": json.dumps({"caption": "a dog", "url": "x"}).encode(), "txt": b"a dog", "jpg": png(0)}
    write_shard(folder / "a-train-0.tar", [{"__key__": f"{n:09}", **captioned} for n in range(3)])
    message = 'has no "parts"; it looks like a picture and its caption .* read it by type: img2dataset'
    with pytest.raises(DataError, match=message):
        opened(config)


# ------------------------------------------------------------------------------------------------ remembered failures


@pytest.mark.parametrize("pattern", ["*.listing.npz", "record.json", "tokens", "starts", "*.safetensors"])
@pytest.mark.parametrize("kept", [0, 100])
def test_a_file_of_the_cache_that_lost_its_end_is_made_again(config, folder, pattern, kept):
    tokens = opened(config).train.row(1).tokens
    files = [file for file in (folder / HIDDEN).rglob(pattern) if file.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[:kept])
    assert files and np.array_equal(opened(config).train.row(1).tokens, tokens)


@pytest.mark.parametrize("pattern", ["*.listing.npz", "*.tokens/record.json"])
def test_every_byte_of_a_record_may_be_damaged(config, folder, pattern):
    fingerprint = opened(config).fingerprint
    record = min((folder / HIDDEN).glob(pattern))
    content = record.read_bytes()
    for place in range(0, len(content), 97):
        record.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        assert opened(config).fingerprint == fingerprint


def test_shards_take_no_open_files(config, folder):
    """A data set may have more shards than `ulimit -n` allows files."""
    for number in range(30):
        write_shard(folder / f"c-train-{number}.tar", [sample(str(number), png(number), "x")])
    before = os.listdir("/proc/self/fd")
    data = opened(config)
    shards = next(iter(data.train.streams.values())).documents.shards
    assert len(shards) >= 30 and os.listdir("/proc/self/fd") == before
    with pytest.raises(ValueError, match="read-only"):
        shards[0].tokens[0] = 0


def test_too_few_files_may_be_open(config, folder, monkeypatch):
    def refused(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    opened(config)
    monkeypatch.setattr(np, "load", refused)
    with pytest.raises(DataError, match=r"listing.npz: cannot be opened .Too many open files.; raise .* ulimit -n"):
        opened(config)


def test_what_a_killed_writer_left_goes(config, folder):
    opened(config)
    left = folder / HIDDEN / "a.npz.12345.writing"
    left.touch()
    opened(config)
    assert not left.exists()


def test_memory_that_does_not_suffice_is_not_remembered(config, folder, monkeypatch):
    opened(config)
    write_shard(folder / "b-train-0.tar", [sample("large", png(77), "x")])
    content = png(77)

    def short(source, *rest):
        if source == content:
            raise MemoryError
        return open_picture(source, *rest)

    monkeypatch.setattr("zoo.modalities.pictures.open_picture", short)
    with pytest.raises(DataError, match="0.png: the memory does not suffice to decode it; free some and start again"):
        opened(config)
    monkeypatch.undo()
    assert len(documents(opened(config))) == 11


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), OSError("4096 requested and 128 written")]
)
@pytest.mark.parametrize("function", ["numpy.savez", "zoo.files.sync"])
def test_a_full_disk_is_one_error(config, folder, monkeypatch, function, error):
    def full(*_args, **_options):
        raise error

    monkeypatch.setattr(function, full)
    message = rf"^data.cache: the disk of .*{HIDDEN} is full \(.*\); free space, or set data.cache to a folder on"
    with pytest.raises(DataError, match=message):
        opened(config)
    monkeypatch.undo()
    assert len(documents(opened(config))) == 10


def test_a_file_that_may_not_grow_is_one_error(config, folder):
    """The system's own error while a shard is tokenised; no half of it stays."""
    message = (
        rf"^data.cache: the disk of .*{HIDDEN} is full \(File too large\); free space, or set data.cache to a folder"
    )
    with small_files(256), pytest.raises(DataError, match=message):
        opened(config)
    assert not list((folder / HIDDEN).glob("*.writing"))
    assert len(documents(opened(config))) == 10


def test_no_room_for_a_plan_is_an_error_and_no_signal(config, folder, monkeypatch):
    monkeypatch.setattr("pretrain.data.plan.IN_MEMORY", 0)
    full = OSError(errno.ENOSPC, "No space left on device")
    message = rf"^data.cache: the disk of .*{HIDDEN} is full \(No space left on device\)"

    def no_room(*_arguments):
        raise full

    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(DataError, match=message):
        opened(config)
    monkeypatch.undo()
    monkeypatch.setattr("pretrain.data.plan.IN_MEMORY", 0)
    data = opened(config)
    monkeypatch.setattr("os.posix_fallocate", no_room)
    with pytest.raises(DataError, match=message):
        data.train.row(0)
    monkeypatch.undo()
    assert len(data.train.row(0).tokens) == 32


# ----------------------------------------------------------------------------------------------------------- identity


def test_the_same_shards_elsewhere_are_the_same_data(config, folder, tmp_path):
    first = opened(config)
    other = tmp_path / "elsewhere"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns(HIDDEN))
    (other / "a-train-0.tar").rename(other / "z-train-9.tar")
    second = opened(config, path=str(other), cache=str(tmp_path / "cache"))
    assert (second.fingerprint, second.validation_fingerprint) == (first.fingerprint, first.validation_fingerprint)
    old, new = ({"data": {"path": path, "cache": cache}} for path, cache in (("a", None), ("b", "c")))
    assert recipes.differences(old, new) == []


def test_validation_shards_that_changed_are_noticed(config, folder):
    first = opened(config)
    write_shard(folder / "a-val-0.tar", [sample("000", png(99), "something else")])
    second = opened(config)
    assert second.fingerprint == first.fingerprint and second.validation_fingerprint != first.validation_fingerprint


def test_a_document_that_is_skipped_under_another_limit_is_other_data(config, folder):
    write_shard(folder / "b-train-0.tar", [sample("large", png(0, side=1200))])
    images = {megapixels: IMAGE | {"max_megapixels": megapixels} for megapixels in (1, 2, 3)}
    found = {m: opened(config, image=image, max_broken_documents=1).fingerprint for m, image in images.items()}
    assert found[1] != found[2]
