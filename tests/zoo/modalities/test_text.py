"""Bytes and byte-pair encoding: round trips, determinism, files, errors."""

import random
import subprocess
import sys

import numpy as np
import pytest

from zoo.config import UserError
from zoo.modalities import BPE, Bytes, Ids

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Ünïcödé 汉字 🙂\n\ttabs  and   spaces",
    "",
    "\x00\xff <bos> <eos>",
]


def test_text_round_trips():
    for tokenizer in (Bytes(Bytes.Config()), BPE.Config(vocab_size=300).fit(TEXTS)):
        for text in [*TEXTS, "never seen: żółw"]:
            ids = tokenizer.encode(text)
            assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.config.carries.size for i in ids)
            assert tokenizer.config.read(tokenizer.write(text)) == text


def test_bpe_shortens_frequent_text_and_keeps_its_size():
    config = BPE.Config(vocab_size=1000)
    tokenizer = config.fit(["seven " * 50])
    assert len(tokenizer.encode("seven seven")) <= 3
    assert config.carries == Ids(1000)  # although training found fewer


def test_bpe_is_a_function_of_its_texts_in_every_process():
    command = (
        "from zoo.modalities import BPE; import random; r = random.Random(0);"
        "print(BPE.Config(vocab_size=400).fit([''.join(r.choices('abcdef ', k=99)) for _ in range(99)]).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    r = random.Random(0)
    here = BPE.Config(vocab_size=400).fit(["".join(r.choices("abcdef ", k=99)) for _ in range(99)])
    assert other.stdout.strip() == here.fingerprint


def test_bpe_saves_and_loads(tmp_path):
    config = BPE.Config(vocab_size=300)
    tokenizer = config.fit(TEXTS)
    tokenizer.save(tmp_path / "text.json")
    loaded = config.load(tmp_path / "text.json")
    assert loaded.encode(TEXTS[0]).tolist() == tokenizer.encode(TEXTS[0]).tolist()
    assert loaded.fingerprint == tokenizer.fingerprint
    assert BPE.Config(vocab_size=301).load(tmp_path / "text.json").fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"uses ids up to 2\d\d, but vocab_size is 256; set vocab_size to"):
        BPE.Config(vocab_size=256).load(tmp_path / "text.json")
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        config.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="broken.json is not a tokenizer.json"):
        config.load(tmp_path / "broken.json")
