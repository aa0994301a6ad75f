"""What is in a tar file comes out of it: every document or a named skip, every byte, whoever wrote it."""

import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.data import DataConfig, DataError, open_data
from pretrain.data.shards import scan_shard
from pretrain.data.tar import list_tar
from tests.pretrain.data.samples import documents, keys, png
from zoo.modalities import parse_modalities

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def text(words: str) -> bytes:
    return json.dumps({"parts": [{"type": "text", "text": words}]}).encode()


def write_tar(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT, **options) -> Path:
    with tarfile.open(path, "w", format=form, **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def opened(folder: Path, **changes):
    config = {
        "path": str(folder),
        "train": "*.tar",
        "validation": None,
        "sequence_length": 64,
        "max_broken_documents": 999,
    }
    image = {"type": "continuous_patches", "image_size": 8, "patch": 4}
    modalities = parse_modalities({"text": {"type": "bytes"}, "image": image})
    lines: list[str] = []
    data = open_data(DataConfig.parse(config | changes, "data"), modalities, 0, lines.append)
    assert all(line.encode() and line.isprintable() for text in lines for line in text.splitlines())
    return data


def texts(folder: Path, **changes) -> list[str]:
    """What the documents of a folder say."""
    found = documents(opened(folder, **changes))
    first = found.vocabulary.range("text")[0]
    stream = [found.document(number) for number in range(len(found))]
    return [bytes((each[1:-1] - first).tolist()).decode() for each in stream]


# --------------------------------------------------------------------------------------------------------- properties

KEYS = st.sampled_from(["a", "a.b", "www.x_1", "www.x_2", "v.1/a", "ü", "k" * 90])
ENDINGS = st.sampled_from(["json", "JSON", "0.png", "v2.json", "v2.0.png", "txt", ""])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(
        st.lists(st.tuples(KEYS, ENDINGS), max_size=6),
        min_size=1,
        max_size=3,
    ),
    form=st.sampled_from(sorted(FORMATS)),
    padding=st.integers(0, 30),
)
def test_members_in_are_documents_and_skips_and_their_bytes(tmp_path, parts, form, padding):
    number, content, archives = 0, [], b""
    for part in parts:
        files = []
        for key, ending in part:
            number += 1
            files.append((f"{key}.{ending}" if ending else key.replace(".", "_"), text(f"document {number}")))
        archives += write_tar(tmp_path / "part", files, FORMATS[form]).read_bytes()
        content += files
    (tmp_path / "x.tar").write_bytes(archives + bytes(512 * padding))
    found = list_tar(tmp_path / "x.tar")
    raw = (tmp_path / "x.tar").read_bytes()
    assert [(each.name, raw[each.offset : each.offset + each.size]) for each in found] == content
    documents = [json.loads(c)["parts"][0]["text"] for name, c in content if name.lower().endswith(".json")]
    if documents:
        data = opened(tmp_path, cache=str(tmp_path / "cache"))
        assert sorted(texts(tmp_path, cache=str(tmp_path / "cache"))) == sorted(documents)
        assert all("json is missing" in skipped.reason for skipped in data.skipped)


def write_tree(source: Path) -> None:
    """Three documents, links to two of them and to nothing, a folder, and a file with a hole in it."""
    source.mkdir()
    for n in range(3):
        (source / f"{n}.v.json").write_bytes(text(f"document {n}"))
    os.link(source / "0.v.json", source / "3.json")
    os.symlink("1.v.json", source / "4.json")
    os.symlink("gone", source / "5.json")
    (source / "folder.json").mkdir()
    with open(source / "6.json", "wb") as file:  # a hole before its text
        file.seek(1 << 20)
        file.write(text("sparse"))


def check_tree(folder: Path, whole: bool = True) -> None:
    """Everything of the tree is there in the shards of a folder, or named.

    Args:
        whole: the file with the hole may have been written out, as zeros.
    """
    data = opened(folder, cache=str(folder / "cache"))
    said = texts(folder, cache=str(folder / "cache"))
    assert said == ["document 0", "document 1", "document 2", "document 0", "document 1"]
    assert [skipped.key for skipped in data.skipped] == ["./5", "./6"]
    assert "./5.json is a link that leads nowhere" in data.skipped[0].reason
    assert whole or "sparse" in data.skipped[1].reason


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(
        st.text(st.characters(exclude_characters="\0/.", exclude_categories=["Cs"]), min_size=1), unique=True
    ),
    compressed=st.booleans(),
)
def test_what_webdataset_writes(tmp_path, keys, compressed):
    with webdataset.TarWriter(str(tmp_path / ("x.tar.gz" if compressed else "x.tar")), compress=compressed) as shard:
        for n, key in enumerate(keys):
            shard.write({"__key__": key, "json": {"parts": [{"type": "text", "text": f"document {n}"}]}, "txt": "x"})
    if keys:
        wanted = {f"document {n}" for n in range(len(keys))}
        pattern = "x.tar.gz" if compressed else "x.tar"
        assert set(texts(tmp_path, train=pattern, cache=str(tmp_path / "cache"))) == wanted


def test_names_composed_in_another_way_are_the_same(tmp_path):
    """As macOS writes them: the letter and its accent are two characters."""
    picture = {"parts": [{"type": "text", "text": "a"}, {"type": "image", "file": "Caf\u00e9.png"}]}
    files = [("x.json", json.dumps(picture).encode()), ("x.Cafe\u0301.png", png(0))]
    files += [("Z\u00fc.json", json.dumps(picture).encode()), ("Zu\u0308.Caf\u00e9.png", png(0))]
    assert opened(write_tar(tmp_path / "x.tar", files).parent).skipped == []


@pytest.mark.parametrize(
    "options", ["--format=ustar", "--format=gnu", "--format=pax", "--format=v7", "--sparse", "-b 1"]
)
def test_what_gnu_tar_writes(tmp_path, options):
    source = tmp_path / "source"
    write_tree(source)
    subprocess.run(["tar", "cf", tmp_path / "x.tar", *options.split(), "--sort=name", "-C", source, "."], check=True)
    check_tree(tmp_path)


@pytest.mark.skipif(not shutil.which("bsdtar"), reason="bsdtar of libarchive is not installed")
@pytest.mark.parametrize(
    "options", ["--format=ustar", "--format=pax", "--format=gnutar", "--format=v7", "--read-sparse"]
)
def test_what_bsd_tar_writes(tmp_path, options):
    write_tree(tmp_path / "source")
    names = sorted(f"./{path.name}" for path in (tmp_path / "source").iterdir())
    subprocess.run(
        ["bsdtar", "cf", tmp_path / "x.tar", *options.split(), "-C", tmp_path / "source", *names], check=True
    )
    check_tree(tmp_path, whole=options != "--read-sparse")


# --------------------------------------------------------------------------------------------------- shards as found


def test_joined_and_repeated_keys(tmp_path):
    files = [("0.json", text("zero")), ("1.json", text("one"))]
    again = [("0.json", text("two")), ("1.json", text("three"))]
    first, second = write_tar(tmp_path / "first", files), write_tar(tmp_path / "second", again)
    (tmp_path / "x.tar").write_bytes(first.read_bytes() + bytes(99 * 512) + second.read_bytes())
    assert texts(tmp_path, train="x.tar") == ["zero", "one", "two", "three"]
    (tmp_path / "y.tar").write_bytes(first.read_bytes())
    subprocess.run(["tar", "--concatenate", "-f", tmp_path / "y.tar", second], check=True)
    assert texts(tmp_path, train="y.tar") == ["zero", "one", "two", "three"]
    entries = scan_shard(write_tar(tmp_path / "z.tar", [*files, ("0.0.png", b"a"), *again, ("0.0.png", b"b")]))
    assert [[m.extension for m in e.members] for e in entries] == [
        ["json", "0.png"],
        ["json"],
        ["json", "0.png"],
        ["json"],
    ]


def test_keys_with_dots(tmp_path):
    names = ["report", "report.v2", "report.v3", *(f"www.site_{n}" for n in range(50)), "v1.2/a", ".hidden"]
    write_tar(
        tmp_path / "x.tar", [(f"{name}.json", text(name)) for name in names] + [("._a.json", b"macOS"), (".DS", b"")]
    )
    data = opened(tmp_path)
    assert keys(data) == names and not data.skipped
    assert texts(tmp_path) == names


@pytest.mark.parametrize("form", FORMATS)
def test_names_that_are_no_text_are_escaped(tmp_path, form):
    names = ["G\xe8ve", "a\nb\x1b[31m", "k" * 90]
    files = [(f"{name}.json", b"no JSON") for name in names]
    files.append(("\\ud83d.json", b'{"parts": [{"type": "image", "file": "smile \\ud83d.jpg"}]}'))
    files.append(("good.json", text("good")))
    write_tar(tmp_path / "x.tar", files, FORMATS[form], encoding="utf-8" if form == "pax" else "latin-1")
    data = opened(tmp_path)
    assert len(documents(data)) == 1 and len(data.skipped) == 4
    key = "Gève" if form == "pax" else r"G\udce8ve"
    assert [skipped.key for skipped in data.skipped[:2]] == [key, r"a\nb\x1b[31m"]
    assert r"smile \ud83d.jpg is missing" in data.skipped[3].reason
    with pytest.raises(DataError, match="4 documents cannot be used") as error:
        opened(tmp_path, max_broken_documents=0)
    str(error.value).encode()


def test_bytes_after_the_end_are_an_error(tmp_path):
    whole = write_tar(tmp_path / "x.tar", [("a.json", text("a"))]).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole + b"junk" * 400)
    with pytest.raises(DataError, match=rf"x.tar: the bytes from {len(whole)} on, after the end .*, are no tar file"):
        list_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole + b"x")
    with pytest.raises(DataError, match=rf"x.tar: the bytes from {len(whole)} on"):
        list_tar(tmp_path / "x.tar")
    (tmp_path / "x.tar").write_bytes(whole + whole[:1024] + bytes(1024))
    assert len(list_tar(tmp_path / "x.tar")) == 2
    (tmp_path / "x.tar").write_bytes(whole + whole[:700])
    with pytest.raises(DataError, match=r"x.tar: the shard is truncated"):
        list_tar(tmp_path / "x.tar")


@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S"])
@pytest.mark.parametrize("size", [b"77777777777\0", b"\x80" + b"\x7f" * 11, b"\xff" * 12, b"\xff" * 10 + b"\x00\x00"])
def test_sizes_beyond_the_file_are_one_error(tmp_path, kind, size):
    good = write_tar(tmp_path / "x.tar", [("a.json", text("a"))], tarfile.GNU_FORMAT).read_bytes()
    header = bytearray(good[:512])
    header[124:136], header[156:157], header[148:156] = size, kind, b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    for before in (b"", good[:1024]):
        (tmp_path / "x.tar").write_bytes(before + bytes(header) + good)
        with pytest.raises(DataError, match=r"x.tar: (the shard is truncated|not a plain tar file|damaged header)"):
            list_tar(tmp_path / "x.tar")
