"""`python -m tools.make_shards`: any source as shards of ours, the same for any number of processes, nothing lost."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import filelock
import pytest
import yaml
from PIL import Image

from tests.pretrain.data.samples import png, sample, small_files, write_shard
from tests.pretrain.data.sources.reading import everything, source
from tools.make_shards import writing
from tools.make_shards.__main__ import main

TINY = Path(__file__).parents[2] / "recipes" / "tiny" / "dense.yaml"


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    """Sixty captions in a file, three of which cannot be used."""
    folder = tmp_path / "captions"
    folder.mkdir()
    rows = [{"caption": f"picture {n} ä", "image": f"{n}.png"} for n in range(60)]
    for n in range(59):
        (folder / f"{n}.png").write_bytes(png(n) if n not in (7, 8) else b"no picture")
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def written(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_captions(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([str(captions), str(out), "type=captions", "--hold-out", "0.2", "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "documents that cannot be used: 3" in said
    assert "2 × a file does not decode, such as x.jsonl: x-00000007: 7.png does not decode (UnidentifiedImage" in said
    assert (
        "1 × its image is not in the folder, such as x.jsonl: x-00000059: its image is not in the folder: 59.png"
        in said
    )
    before = [told for told in everything(source("captions", captions), tmp_path).values() if isinstance(told, list)]
    before = [told for told in before if told[1][1] != b"no picture"]
    sides = {
        split: list(everything(source("documents", out, files=f"{split}*.tar"), tmp_path).values())
        for split in ("train", "val")
    }
    assert sorted(sides["train"] + sides["val"]) == sorted(before)
    assert 4 <= len(sides["val"]) <= 20
    summary = json.loads((out / "summary.json").read_text())
    assert summary["documents"] == {split: len(each) for split, each in sides.items()}
    assert summary["parts"] == {"image": 57, "text": 57} and summary["sides"] == {"8-15": 57}
    assert Image.open(out / "contact_sheet.png").height > 16 * 128
    with tarfile.open(out / "train-00000.tar") as tar:
        assert {member.mtime for member in tar} == {0}
        first = json.load(tar.extractfile(tar.getmembers()[0]))
    assert first["source"].startswith("x-0000") and first["parts"][1] == {"type": "image", "file": "1.png"}


def test_pieces_change_nothing(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [str(captions), "type=captions", "swapped=0.5", "--hold-out", "0.1", "--workers", "1"]
    for name, piece in (("whole", 1 << 20), ("pieces", 100)):
        monkeypatch.setattr(writing, "PIECE", piece)
        assert main([words[0], str(tmp_path / name), *words[1:]]) == 0
    assert written(tmp_path / "whole") == written(tmp_path / "pieces")


def test_small_shards_hold_the_same(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "PIECE", 100)
    for name, size in (("large", "9"), ("small", "0")):
        words = ["type=captions", "--megabytes", size, "--workers", "1"]
        assert main([str(captions), str(tmp_path / name), *words]) == 0
    large, small = (everything(source("documents", tmp_path / name), tmp_path) for name in ("large", "small"))
    assert large == small and len(list((tmp_path / "small").glob("train*.tar"))) > 5


@pytest.mark.slow
def test_processes_change_nothing(captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(3):
        (captions / f"y{n}.jsonl").write_bytes((captions / "x.jsonl").read_bytes())
    for workers in ("1", "2"):
        assert main([str(captions), str(tmp_path / workers), "type=captions", "--workers", workers]) == 0
    assert written(tmp_path / "1") == written(tmp_path / "2")


def test_equal_documents_are_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for n in range(60):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"text {n // 3}")
    assert (
        main([str(tmp_path / "texts"), str(tmp_path / "out"), "type=text", "--hold-out", "0.3", "--workers", "1"]) == 0
    )
    train, held = (
        {
            str(told)
            for told in everything(source("documents", tmp_path / "out", files=f"{split}*.tar"), tmp_path).values()
        }
        for split in ("train", "val")
    )
    assert len(train) + len(held) == 20 and not train & held and held


def test_a_recipe_counts_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a.tar", [sample(f"{n}", "abc", png(n)) for n in range(4)])
    modalities = {"text": {"type": "bytes"}, "image": {"type": "continuous_patches", "image_size": 8, "patch": 4}}
    recipe = yaml.safe_load(TINY.read_text()) | {"modalities": modalities, "imports": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["type=documents", "--recipe", str(tmp_path / "recipe.yaml"), "--hold-out", "0", "--workers", "1"]
    assert main([str(tmp_path / "a.tar"), str(tmp_path / "out"), *words]) == 0
    assert "tokens: text 28, image 16" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("val*"))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["type=caption"], r"^source.type: 'caption' is not known; known: .*did you mean 'captions'"),
        (["type=captions", "--hold-out", "1"], "^--hold-out: 1.0: must be at least 0 and below 1"),
        (["type=captions", "txt=x"], "^source.txt: unknown key; known: path, files, .*did you mean 'text'"),
        (["type=captions", "text=words"], "(?s)^none of the documents can be used:.*60 × it has no column, such as"),
    ],
)
def test_mistakes(
    captions: Path, tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(captions), str(tmp_path / "out"), *words, "--workers", "1"]) == 2
    assert re.search(reason, capsys.readouterr().err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*writing*"))


def test_a_full_disk_is_one_error_that_leaves_nothing(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", [str(captions), str(tmp_path / "out"), "type=captions", "--workers", "1"]
    with small_files(4096):
        assert main(words) == 2
    assert re.fullmatch(
        rf"OUT: the disk of {re.escape(str(tmp_path))} is full \(File too large\); free space, or set OUT to a folder "
        "on another disk, and give the same command again\n",
        capsys.readouterr().err,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["captions"]
    assert main(words) == 0 and {path.name for path in out.iterdir()} >= {"train-00000.tar", "summary.json"}


def test_what_a_killed_one_has_left_is_not_believed(captions: Path, tmp_path: Path) -> None:
    """Half of it is there under another name; the same command begins anew and removes that."""
    script = "import os, sys; from tools.make_shards import run, __main__ as main; "
    script += "run.draw_sheet = lambda *_: os.kill(os.getpid(), 9); main.main(sys.argv[1:])"
    words = [str(captions), str(tmp_path / "out"), "type=captions", "--workers", "1"]
    killed = subprocess.run([sys.executable, "-c", script, *words], cwd=Path(__file__).parents[2])
    assert killed.returncode == -9
    (left,) = tmp_path.glob("out*")
    assert re.fullmatch(r"out\.\d+\.writing", left.name) and (left / "train-00000.tar").exists()
    assert main(words) == 0 and not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"captions", "out"}
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".tar", ".json", ".png"}


def test_one_at_a_time(captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with filelock.FileLock(tmp_path / ".out.lock"):
        assert main([str(captions), str(tmp_path / "out"), "type=captions", "--workers", "1"]) == 2
    assert "out: another process is writing it; wait for it, or give another folder" in capsys.readouterr().err


def test_a_folder_that_holds_something_is_left_alone(captions: Path, tmp_path: Path) -> None:
    assert main([str(captions), str(captions), "type=captions"]) == 2
    assert (captions / "x.jsonl").exists()
