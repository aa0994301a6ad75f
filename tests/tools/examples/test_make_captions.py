"""`python -m tools.examples.make_captions`: captions and pictures arrive as they were.

Held-out ones are divided, odd ones passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.finetune.questions import read_questions
from tests.pretrain.data.samples import png, sample, write_shard
from tools.examples import make_captions


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four sound training documents in two shards, three held-out ones, and one of each kind that is passed over."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_shard(folder / "a-train-0.tar", [sample(f"{n:02d}", png(n), f"caption {n}") for n in range(2)])
    odd = {
        "no picture": sample("10", "words alone"),
        "no text": sample("11", png(11), " \n"),
        "no file": sample("12", png(12), "x", **{"0.png": b""}),
        "no JSON": sample("13", png(13), "x", json=b"{"),
    }
    several = sample("03", "first,\n ", png(3), "  then\tsecond\u2028.", png(4))
    write_shard(folder / "a-train-1.tar", [sample("00", png(2), "same key"), several, *odd.values()])
    write_shard(folder / "a-val-0.tar", [sample(f"{n}", f"held {n}", png(n)) for n in range(5, 8)])
    return folder


def lines(out: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]


def test_captions(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert make_captions.main([str(shards), str(out)]) == 0
    asked = {"question": "Describe the picture."}
    assert lines(out, "train") == [
        {"image": "train/000000.0.png", **asked, "answer": "caption 0"},
        {"image": "train/000001.0.png", **asked, "answer": "caption 1"},
        {"image": "train/000002.0.png", **asked, "answer": "same key"},
        {"images": ["train/000003.1.png", "train/000003.3.png"], **asked, "answer": "first, then second ."},
    ]
    assert [line["answer"] for line in lines(out, "validation")] == ["held 5"]
    assert [line["answer"] for line in lines(out, "test")] == ["held 6", "held 7"]
    pictures = {"train/000001.0.png": 1, "train/000002.0.png": 2, "train/000003.3.png": 4, "test/000001.1.png": 7}
    for name, seed in pictures.items():
        assert (out / name).read_bytes() == png(seed), name
    said = capsys.readouterr().out
    assert "train 4, validation 1, test 2" in said and "2 without picture or text, 2 broken" in said
    assert "a-train-1.tar: 12: 0.png does not decode" in said and "a-train-1.tar: 13: its JSON is not" in said


def test_the_trainer_reads_them(shards: Path, tmp_path: Path) -> None:
    make_captions.write(shards, tmp_path / "out", question="What is it?")
    assert [len(read_questions(tmp_path / "out", split)) for split in ("train", "validation", "test")] == [4, 1, 2]
    last = read_questions(tmp_path / "out")[-1]
    assert len(last.pictures()) == 2 and last.turns == (("What is it?", "first, then second ."),)


def test_same_shards_same_bytes(shards: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_captions.write(shards, tmp_path / name)
    files = [each.relative_to(tmp_path / "one") for each in (tmp_path / "one").rglob("*.*")]
    assert len(files) == 3 + 5 + 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train", "*none*.tar"], "--train: no shard in"),
        (["--held-out", "*.tar"], "--held-out: a-train-0.tar matches '*.tar' and --train '*train*.tar' alike"),
        (["--train", "*-val*.tar", "--held-out", "*bad*.tar"], "--held-out: 1 of the 2 documents in its shards"),
        (["--train", "*damaged*.tar"], "damaged.tar: the shard is truncated"),
        (["--question", " "], "--question: is empty"),
    ],
)
def test_bad_input(options: list[str], message: str, shards: Path, tmp_path: Path, capsys: Any) -> None:
    write_shard(shards / "bad.tar", [sample("0", png(0), "one"), sample("1", "words alone")])
    (shards / "damaged.tar").write_bytes((shards / "a-val-0.tar").read_bytes()[:2000])
    assert make_captions.main([str(shards), str(tmp_path / "out"), *options]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_folders(shards: Path, tmp_path: Path, capsys: Any) -> None:
    assert make_captions.main([str(tmp_path / "none"), str(tmp_path / "out")]) == 2
    assert "none: does not exist" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert make_captions.main([str(shards), str(tmp_path / "file")]) == 2
    assert "file: is a file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "test.jsonl").write_text("{}")
    assert make_captions.main([str(shards), str(tmp_path / "out")]) == 2
    assert "holds test.jsonl already" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["test.jsonl"]
