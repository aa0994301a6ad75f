"""`python -m tools.examples.formats`: documents in every format and back, and a difference that is seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pretrain.data.samples import png, sample, write_shard
from tests.zoo.modalities.speech.waves import file, tone
from tools.examples import formats
from tools.examples.formats import FORMATS, Part, Read, Result, compare, main, shape_of


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three documents of each shape, with what formats have to escape."""
    odd = ['a, "b"\n\nc', "<p> & `ticks` ```", "d\te  \n f"]
    documents = [sample(f"a{n}", text, png(n)) for n, text in enumerate(odd)]
    documents += [sample(f"b{n}", png(n), text) for n, text in enumerate(odd)]
    documents += [sample(f"c{n}", f"one {n}\n\ntwo", png(n), png(n + 9), "three") for n in range(3)]
    documents += [sample(f"d{n}", text) for n, text in enumerate(odd)]
    for n in range(3):
        parts = b'{"parts": [{"type": "audio", "file": "0.wav"}, {"type": "text", "text": "%d"}]}' % n
        documents.append({"__key__": f"e{n}", "json": parts, "0.wav": file(tone(0.1), subtype="PCM_16")})
    (tmp_path / "below").mkdir()
    write_shard(tmp_path / "below" / "0.tar", documents)
    return tmp_path


def test_all_come_back(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = list(compare(shards, shards / "out"))
    assert len(found) == len(FORMATS) + sum(each.shape == "pair" for each in FORMATS), "both orders of pairs"
    wrong = [result for result in found if result.equal < result.documents]
    assert not wrong, wrong
    assert all(result.documents == 3 and not result.other for result in found)


def test_a_difference_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lossy(folder: Path, documents: list[list[Part]]) -> Read:
        for number, (part,) in enumerate(documents):
            (folder / f"{number}.txt").write_bytes(part.content.rstrip())
        return Read({"type": "text"}, documents)

    documents = [[Part("text", b"a")], [Part("text", b"b ")]]
    assert formats.there_and_back(formats.Format("lossy", "text", lossy), documents, tmp_path / "lossy") == Result(
        "lossy", 2, 1, 1, 3
    )
    assert shape_of([Part("video", b"")]) == ""


def test_the_command(shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "FORMATS", [each for each in FORMATS if each.name.startswith("text, one file")])
    assert main([str(shards)]) == 0
    assert "text, one file with separators" in capsys.readouterr().out
    assert main([str(shards), str(shards)]) == 2
    assert "is there already; give another folder" in capsys.readouterr().err
    assert main([str(shards / "nowhere")]) == 2
