"""Formats: the same documents, whatever they are written as; what cannot be read is named."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from tests.pretrain.data.samples import png
from tests.pretrain.data.sources.reading import everything, source
from zoo import registry
from zoo.config import ConfigError

PAIRS = [(f"a picture of {n},\n“{n}”", png(n)) for n in range(6)]
WANTED = [[("text", text.encode()), ("image", picture)] for text, picture in PAIRS]


def pictures(folder: Path) -> list[dict[str, Any]]:
    """The pairs as records that name files of a folder, which are written."""
    (folder / "pictures").mkdir()
    for n, (_, picture) in enumerate(PAIRS):
        (folder / "pictures" / f"{n} ä.png").write_bytes(picture)
    return [{"caption": text, "image": f"pictures/{n} ä.png"} for n, (text, _) in enumerate(PAIRS)]


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# ----------------------------------------------------------------------------------------------------------- captions


def as_jsonl(folder: Path) -> str:
    (folder / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pictures(folder)))
    return "captions"


def as_jsonl_with_the_pictures(folder: Path) -> str:
    urls = [f"data:image/png;base64,{base64.b64encode(picture).decode()}" for _, picture in PAIRS]
    rows = [{"caption": text, "image": url} for (text, _), url in zip(PAIRS, urls, strict=True)]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "captions"


def as_csv(folder: Path) -> str:
    with open(folder / "x.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "caption"])
        writer.writeheader()
        writer.writerows(pictures(folder))
    return "captions"


def as_parquet(folder: Path) -> str:
    rows = [{"caption": text, "image": picture} for text, picture in PAIRS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "x.parquet", row_group_size=4)
    return "captions"


def as_hugging_face(folder: Path) -> str:
    rows = [{"caption": text, "image": {"bytes": picture, "path": None}} for text, picture in PAIRS]
    features = datasets.Features({"caption": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_list(rows, features).save_to_disk(folder, num_shards=2)
    return "captions"


def as_img2dataset(folder: Path) -> str:
    for shard in range(2):
        files: dict[str, bytes] = {}
        for n, (text, picture) in list(enumerate(PAIRS))[3 * shard : 3 * shard + 3]:
            files[f"{n:09}.png"] = picture
            files[f"{n:09}.txt"] = text.encode()
            files[f"{n:09}.json"] = json.dumps({"caption": text, "key": f"{n:09}", "status": "success"}).encode()
        write_tar(folder / f"{shard:05}.tar", files)
    return "img2dataset"


def as_pairs_with_json_alone(folder: Path) -> str:
    files = {}
    for n, (text, picture) in enumerate(PAIRS):
        files |= {f"www.site_{n}.JPG": picture, f"www.site_{n}.json": json.dumps({"caption": text}).encode()}
    write_tar(folder / "x.tar", files)
    return "img2dataset"


def as_pairs_with_text_alone(folder: Path) -> str:
    write_tar(
        folder / "x.tar",
        {
            f"www.site_{n}.{kind}": part
            for n, (text, picture) in enumerate(PAIRS)
            for kind, part in (("txt", text.encode()), ("webp", picture))
        },
    )
    return "img2dataset"


def as_lists(folder: Path) -> str:
    rows = [{"texts": [text, None], "images": [None, picture]} for text, picture in PAIRS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "x.parquet")
    return "interleaved"


def as_mmc4(folder: Path) -> str:
    rows = [
        {
            "text_list": [record["caption"]],
            "image_info": [{"image_name": record["image"], "matched_text_index": 0, "matched_sim": 0.3}],
        }
        for record in pictures(folder)
    ]
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "mmc4"


@pytest.mark.parametrize(
    "write",
    [
        as_jsonl,
        as_jsonl_with_the_pictures,
        as_csv,
        as_parquet,
        as_hugging_face,
        as_img2dataset,
        as_pairs_with_json_alone,
        as_pairs_with_text_alone,
        as_lists,
        as_mmc4,
    ],
)
def test_pairs(write: Callable[[Path], str], tmp_path: Path) -> None:
    kind = write(tmp_path)
    assert list(everything(source(kind, tmp_path), tmp_path).values()) == WANTED


@pytest.mark.parametrize("write", [as_jsonl, as_img2dataset, as_mmc4])
def test_order(write: Callable[[Path], str], tmp_path: Path) -> None:
    kind = write(tmp_path)
    turned = [document[::-1] for document in WANTED]
    assert list(everything(source(kind, tmp_path, order="text_last"), tmp_path).values()) == turned
    assert list(everything(source(kind, tmp_path, swapped=1.0), tmp_path).values()) == turned
    some = list(everything(source(kind, tmp_path, swapped=0.5), tmp_path).values())
    swapped = [document == other for document, other in zip(some, turned, strict=True)]
    assert 0 < sum(swapped) < len(PAIRS)
    assert list(everything(source(kind, tmp_path, swapped=0.5, order="text_last"), tmp_path).values()) == [
        document[::-1] for document in some
    ]


def test_captions_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.png").symlink_to("../secret.png")
    rows = {
        "../secret.png": "its image lies outside the folder: ../secret.png",
        str(tmp_path / "secret.png"): "its image is not in the folder: ",
        "link.png": "its image lies outside the folder: link.png",
        "none.png": "its image is not in the folder: none.png",
        "": "its image has no name: ''",
        "x" * 5000: "its image is not in the folder: xxx",
        "a\0b": "its image is not in the folder: a",
        "https://a.b/c.png": "its image is a URL that nobody has fetched: https://a.b/c.png",
        "data:image/png;base64,?": "its image is a data: URL that does not decode: data:",
    }
    records = [{"caption": "x", "image": image} for image in rows]
    lines = [json.dumps(record) for record in (*records, {"caption": "x"}, {"caption": None, "image": "link.png"})]
    (folder / "x.jsonl").write_text("\n".join(lines))
    reasons = list(everything(source("captions", folder), tmp_path).values())
    wanted = [*rows.values(), "it has no column 'image'; it has caption", "its image lies outside the folder: link.png"]
    for reason, begins in zip(reasons, wanted, strict=True):
        assert isinstance(reason, str) and reason.startswith(begins) and len(reason) < 300


def test_transcripts_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "wavs").mkdir()
    (tmp_path / "wavs" / "LJ001-0001.wav").write_bytes(b"RIFF")
    (tmp_path / "metadata.csv").write_text("LJ001-0001|Printing, in 1455|Printing, in fourteen fifty-five\n")
    keys = {"columns": ["id", "raw", "spoken"], "delimiter": "|", "name": "wavs/{}.wav", "text": "spoken"}
    spoken = source("captions", tmp_path / "metadata.csv", image=None, audio="id", **keys)
    assert everything(spoken, tmp_path) == {
        "metadata-00000000": [("text", b"Printing, in fourteen fifty-five"), ("audio", b"RIFF")]
    }
    with pytest.raises(ConfigError, match="^data.source: .*names both image and audio, or neither"):
        source("captions", tmp_path, audio="id")


def test_pairs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    files = {
        "a.json": b'{"caption": "x", "status": "failed_to_download"}',
        "b.jpg": b"",
        "c.jpg": b"",
        "c.txt": b"\xff",
    }
    files |= {"d.jpg": b"1", "d.png": b"2", "d.txt": b"x", "e.jpg": b"", "e.json": b'{"caption": null}'}
    write_tar(tmp_path / "x.tar", files)
    found = everything(source("img2dataset", tmp_path), tmp_path)
    assert found["d"] == [("text", b"x"), ("image", b"1")]
    assert found["a"].startswith("it has no picture (jpg, ") and found["b"] == "it has no caption"
    assert found["c"].startswith("its caption cannot be read (UnicodeDecodeError")
    assert found["e"] == "its JSON has no text 'caption'"
    only = source("img2dataset", tmp_path)
    with only.open(only.shards()[0], tmp_path) as documents:
        assert documents[3].contents().losses == [("a second picture of a pair", "d.png")]


# -------------------------------------------------------------------------------------------------------- interleaved


def test_interleaved(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.svg").write_bytes(b"<?xml version='1.0'?><svg/>")
    images = [None, "0.png", None, "https://a.b/c.jpg", "bad.png", "bad.svg", "../0.png"]
    texts = ["one", None, "two", None, None, None, None]
    rows = [{"texts": texts, "images": images}, {"texts": ["x"], "images": []}, {"texts": [None], "images": ["n.png"]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"texts": "x"}])))
    pages = source("interleaved", tmp_path)
    assert list(everything(pages, tmp_path).values()) == [
        [("text", b"one"), ("image", png(0)), ("text", b"two")],
        "it has 1 texts and 0 images; the lists stand side by side",
        "nothing of it can be used: image is not in the folder: n.png",
        "it has no list 'texts'",
    ]
    with pages.open(pages.shards()[0], tmp_path) as documents:
        assert [loss.kind for loss in documents[0].contents().losses] == [
            "image is a URL that nobody has fetched",
            "image is no picture that can be opened",
            "image is a drawing (SVG)",
            "image lies outside the folder",
        ]


def test_matched_sentences(tmp_path: Path) -> None:
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    info = [{"image_name": f"{n}.png", "matched_text_index": at} for n, at in ((0, 1), (1, 1), (2, 3))]
    rows = [
        {"text_list": list("abcd"), "image_info": info},
        {"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    image = [("image", png(n)) for n in range(3)]
    after, broken = everything(source("mmc4", tmp_path), tmp_path).values()
    assert after == [("text", b"a b"), image[0], image[1], ("text", b"c d"), image[2]]
    assert broken == "image 0 has no matched_text_index from 0 to 0"
    before, _ = everything(source("mmc4", tmp_path, order="text_last", joint=""), tmp_path).values()
    assert before == [("text", b"a"), image[0], image[1], ("text", b"bc"), image[2], ("text", b"d")]


# -------------------------------------------------------------------------------------------------------------- others


def test_conversations(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    said = [("human", "<image>\nWhat is this?"), ("gpt", "A dog."), ("human", "Sure?"), ("gpt", "Yes.")]
    turns = [{"from": speaker, "value": value} for speaker, value in said]
    rows = [
        {"id": "1", "image": "0.png", "conversations": turns},
        {"id": "2", "conversations": turns[2:]},
        {"id": "3", "conversations": turns},
        {"id": "4", "image": "1.png", "conversations": turns},
        {"id": "5", "conversations": [{"from": "bot", "value": ""}]},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert list(everything(source("llava", tmp_path), tmp_path).values()) == [
        [
            ("text", b"USER: "),
            ("image", png(0)),
            ("text", b"What is this?\nASSISTANT: A dog.\nUSER: Sure?\nASSISTANT: Yes.\n"),
        ],
        [("text", b"USER: Sure?\nASSISTANT: Yes.\n")],
        "it has 0 images for 1 places <image>",
        "its image is not in the folder: 1.png",
        "conversations[0] is {'from': 'bot', 'value': ''}; it needs from: human or gpt, and value",
    ]
    bare = source("llava", tmp_path, human="", assistant="", end="")
    assert everything(bare, tmp_path)["x-00000000"][0] == ("image", png(0))


def test_plain_texts(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "a.txt").write_bytes("\ufeffä\r\n".encode())
    (folder / "b.txt").write_bytes(b"\xff")
    (folder / "c.txt").write_bytes(b"")
    (folder / "below" / "d.txt").write_text("x")
    (folder / "e.jsonl").write_text('{"text": "one"}\n{"content": "two"}\n')
    found = everything(source("text", folder), tmp_path)
    assert found == {
        "texts/a.txt": [("text", "ä\r\n".encode())],
        "texts/b.txt": "it is not UTF-8 (invalid start byte at byte 0)",
        "texts/c.txt": "it is empty",
        "below/d.txt": [("text", b"x")],
        "e-00000000": [("text", b"one")],
        "e-00000001": "it has no column 'text'; it has content",
    }


def test_texts_between_separators(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one\n<|endoftext|>two<|endoftext|><|endoftext|>three")
    parts = everything(source("text", tmp_path / "x.txt", separator="<|endoftext|>"), tmp_path)
    assert list(parts.values()) == [[("text", text)] for text in (b"one\n", b"two", b"three")]
    (tmp_path / "x.txt").write_text("")
    assert everything(source("text", tmp_path / "x.txt", separator="|"), tmp_path) == {}


def test_recordings(tmp_path: Path) -> None:
    chapter = tmp_path / "19" / "198"
    chapter.mkdir(parents=True)
    for name in ("19-198-0000.flac", "19-198-0001.flac", "b.wav", "c.wav"):
        (chapter / name).write_bytes(name.encode())
    (chapter / "19-198.trans.txt").write_text("19-198-0000 NORTHANGER ABBEY\n19-198-0001 THIS LITTLE WORK\n")
    (chapter / "b.normalized.txt").write_text("beside it\n")
    found = everything(source("audio_folder", tmp_path), tmp_path)
    assert found == {
        "19/198/19-198-0000.flac": [("text", b"NORTHANGER ABBEY"), ("audio", b"19-198-0000.flac")],
        "19/198/19-198-0001.flac": [("text", b"THIS LITTLE WORK"), ("audio", b"19-198-0001.flac")],
        "19/198/b.wav": [("text", b"beside it"), ("audio", b"b.wav")],
        "19/198/c.wav": "it has no transcript: .txt, .normalized.txt, .lab beside it, or a line in *.trans.txt",
    }
    turned = everything(source("audio_folder", tmp_path, order="text_last"), tmp_path)
    assert turned["19/198/b.wav"] == [("audio", b"b.wav"), ("text", b"beside it")]


def test_a_changed_picture_changes_the_stamp_and_the_identity(tmp_path: Path) -> None:
    as_jsonl(tmp_path)
    first = source("captions", tmp_path)
    shard = first.shards()[0]
    before = first.stamp(shard), first.identity(shard, tmp_path)
    (tmp_path / "pictures" / "0 ä.png").write_bytes(png(99, 9))
    after = source("captions", tmp_path)
    assert all(
        one != other for one, other in zip(before, (after.stamp(shard), after.identity(shard, tmp_path)), strict=True)
    )


def test_the_entries_that_the_page_shows_are_valid() -> None:
    page = (Path(__file__).parents[4] / "docs" / "data.md").read_text()
    entries = re.findall(r"^\| `(\w+)` \|.*\| `(\w+: \{type: .*\})` \|$", page, re.MULTILINE)
    assert {name for name, _ in entries} == {name for name in registry.known("source") if name.islower()}
    for name, entry in entries:
        ((_, keys),) = yaml.safe_load(entry.replace("\\|", "|")).items()
        assert keys["type"] == name and registry.parse_block("source", keys, "source")
    (table,) = re.findall(r"`(\{type: captions, path: metadata.csv.*?\})`", page, re.DOTALL)
    assert registry.parse_block("source", yaml.safe_load(table), "source")
