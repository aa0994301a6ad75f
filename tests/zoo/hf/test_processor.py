"""The processor and the tokenizer of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from tests.zoo.test_generate import KINDS, item_of, make_run, plain
from zoo.generate import Part, document
from zoo.hf import ZooProcessor
from zoo.hf.tokenizer import stream_tokenizer
from zoo.modalities import Modality, parse_modalities
from zoo.modalities.text import PROBES

TEXTS = [*PROBES, "", " a  b ", "<bos> is text", "seven\n"]


@pytest.mark.parametrize("kind", KINDS)
def test_documents_there_and_back(kind: str) -> None:
    run = make_run(kind)
    processor, item = ZooProcessor(run.modalities), item_of(run)
    documents: list[list[Part | str]] = [["ab", item, "c"], ["x"]]
    features = processor(documents)
    ids, mask = features["input_ids"], features["attention_mask"]
    for row, (parts, valid) in enumerate(zip(documents, mask.bool(), strict=True)):
        piece = document(run, parts)
        assert ids[row][valid].tolist() == piece.tokens.tolist()
        assert valid.tolist() == sorted(valid.tolist()), "padding is on the left"
        for name, values in piece.content.items():
            places = ids[row] == run.grammars[name].choice.start
            np.testing.assert_array_equal(features["content"][name][row][places].numpy(), values)
            assert not features["content"][name][row][~places].any()
    carries_ids = not run.grammars["x"].holds_places
    [first, second] = processor.batch_parts(ids)
    seen = run.modalities["x"].decode(run.modalities["x"].encode(item.item))
    expected = [Part("text", "ab"), Part("x", seen), Part("text", "c")]
    assert plain(first) == plain(expected if carries_ids else [expected[0], expected[2]])
    assert second == [Part("text", "x")] and processor.decode(ids[1]) == "x"
    assert processor.batch_decode(ids)[0] == ("ab[x]c" if carries_ids else "abc")
    assert processor.parts(ids[0][:4]) == [Part("text", "ab")], "an item without an end is left out"


def bpe() -> Any:
    config = parse_modalities({"text": {"type": "bpe", "vocab_size": 300}})["text"]
    return config.fit([text * 20 for text in TEXTS])


def huggingface(folder: Path, model: str) -> Any:
    """A pretrained tokenizer with special tokens of its own, byte-level or not."""
    folder.mkdir()
    if model == "byte-level":
        inner = bpe().inner
        inner.add_special_tokens(["</s>", "<unk>"])
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    inner.save(str(folder / "tokenizer.json"))
    section = {"type": "huggingface", "path": str(folder), "vocab_size": 320, "lossy": True}
    return parse_modalities({"text": section})["text"].open()


@pytest.mark.parametrize("kind", ["bytes", "bpe", "byte-level"])
def test_the_tokenizers_ids_are_the_streams(tmp_path: Path, kind: str) -> None:
    text: Modality = {
        "bytes": lambda: parse_modalities({"text": {"type": "bytes"}})["text"].open(),
        "bpe": bpe,
        "byte-level": lambda: huggingface(tmp_path / "pretrained", kind),
    }[kind]()
    modalities = {"text": text, "x": make_run("ids").modalities["x"]}
    processor = ZooProcessor(modalities)
    processor.save_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for item in TEXTS:
        ids = processor([[item]])["input_ids"][0]
        assert tokenizer(item)["input_ids"] == ids.tolist(), item
        assert tokenizer.decode(ids[1:]) == item
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.convert_tokens_to_ids("<begin_x>") == processor.vocabulary.begin("x")
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert torch.equal(batch["attention_mask"], processor([["a"], ["abc"]])["attention_mask"])


def test_other_tokenizers_are_left_to_the_processor(tmp_path: Path) -> None:
    modalities = {"text": huggingface(tmp_path / "pretrained", "words")}
    assert stream_tokenizer(modalities) is None
    ZooProcessor(modalities).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = ZooProcessor.from_pretrained(tmp_path / "out")
    assert again.modalities["text"].fingerprint == modalities["text"].fingerprint
    assert str(tmp_path) not in (tmp_path / "out" / "processor_config.json").read_text()
