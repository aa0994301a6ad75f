"""`python -m tools.train_tokenizer`: it saves what the data are then read with."""

import pytest

from pretrain.data import DataConfig, open_data
from tools import train_tokenizer
from zoo.modalities import parse_modalities


def test_it_saves_what_the_pipeline_loads(digit_shards, tmp_path, capsys):
    keys = "text.type=bpe text.vocab_size=280 image.type=patches image.image_size=8 image.patch=2 image.codes=64"
    arguments = ["--path", str(digit_shards), *keys.split(), "image.channels=1", "--out", str(tmp_path)]
    assert train_tokenizer.main(arguments) == 0
    files = capsys.readouterr().out.splitlines()[-2:]
    assert files == [str(tmp_path / "text.json"), str(tmp_path / "image.safetensors")]
    text = {"type": "bpe", "vocab_size": 280}
    image = {"type": "patches", "image_size": 8, "patch": 2, "codes": 64, "channels": 1}
    config = DataConfig(path=str(digit_shards), sequence_length=64)
    trained = {"text": text, "image": image}
    asked = {"text": text | {"path": files[0]}, "image": image | {"path": files[1]}}
    given, own = (open_data(config, parse_modalities(m), seed=0, log=lambda line: None) for m in (asked, trained))
    assert given.fingerprint == own.fingerprint
    assert len(given.modalities["text"].encode("seven")) == 1


def test_it_prints_one_line_for_a_mistake(tmp_path, capsys):
    assert train_tokenizer.main(["--path", str(tmp_path), "text.type=bpe"]) == 2
    assert capsys.readouterr().err.startswith("error: data.train: no shard in ")
    with pytest.raises(SystemExit):
        train_tokenizer.main([])
