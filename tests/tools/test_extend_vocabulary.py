"""`python -m tools.extend_vocabulary`: new words become tokens, and nothing that was said changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tools import extend_vocabulary, make_llava

SIZES: dict[str, Any] = {
    "image_size": 16,
    "patch": 4,
    "vision": {"d_model": 16, "layers": 1, "heads": 2, "d_ff": 16},
    "decoder": {"d_model": 16, "layers": 2, "heads": 2, "d_ff": 16, "positions": 64},
}


def write_questions(folder: Path, question: str, answer: str) -> Path:
    folder.mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / "a.png")
    (folder / "train.jsonl").write_text(json.dumps({"image": "a.png", "question": question, "answer": answer}) + "\n")
    return folder


def made(tmp_path: Path, **sizes: Any) -> Path:
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(SIZES | sizes))
    old = write_questions(tmp_path / "old", "What is at row 2, column 3?", "seven")
    assert make_llava.main([str(tmp_path / "sizes.yaml"), str(old), str(tmp_path / "model")]) == 0
    return tmp_path / "model"


def test_new_words_are_tokens_and_old_ones_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = made(tmp_path), tmp_path / "out"
    new = write_questions(tmp_path / "new", "What shares a row with the seven at row 2, column 3?", "Nothing")
    assert extend_vocabulary.main([str(model), str(new), str(out)]) == 0
    assert "6 words more: a, nothing, row, shares, the, with" in capsys.readouterr().out
    before, after = (AutoProcessor.from_pretrained(each) for each in (model, out))
    size = len(before.tokenizer)
    old_text, text = "<image>What is at row 2, column 3?\nseven", "Nothing shares THE other row 2, column 3"
    assert before.tokenizer(old_text).input_ids == after.tokenizer(old_text).input_ids
    assert after.tokenizer.tokenize(text) == ["nothing", "shares", "the", "<unk>", "row 2, column 3"]
    assert after.tokenizer.convert_tokens_to_ids(["a", "with"]) == [size, size + 5]

    picture = Image.fromarray(np.full((16, 16), 99, np.uint8)).convert("RGB")
    inputs = before(images=picture, text=old_text, return_tensors="pt")
    logits = [AutoModelForImageTextToText.from_pretrained(each).eval()(**inputs).logits for each in (model, out)]
    assert logits[1].shape[-1] == size + 6
    torch.testing.assert_close(logits[1][..., :size], logits[0])


def test_no_word_is_added_twice(tmp_path: Path) -> None:
    model = made(tmp_path)
    new = write_questions(tmp_path / "new", "What is with the seven?", "the")
    assert extend_vocabulary.main([str(model), str(new), str(tmp_path / "once")]) == 0
    assert extend_vocabulary.main([str(tmp_path / "once"), str(new), str(tmp_path / "twice")]) == 0
    vocabularies = [AutoProcessor.from_pretrained(tmp_path / each).tokenizer.get_vocab() for each in ("once", "twice")]
    assert vocabularies[0] == vocabularies[1]


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = made(tmp_path, vocabulary=300)
    data = str(tmp_path / "old")
    for arguments, message in (
        ([str(model), data, str(tmp_path / "out")], "needs no more of them"),
        ([str(model), data, str(model)], "holds a model already; give another folder"),
        ([data, data, str(tmp_path / "out")], "holds no config.json"),
        ([str(model), str(tmp_path), str(tmp_path / "out")], "train.jsonl"),
    ):
        assert extend_vocabulary.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
