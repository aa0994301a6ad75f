"""`python -m tools.arank`: from a folder of weights and one of questions to arank.json and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.pretrain.data.samples import png, sample, write_shard
from tests.pretrain.finetune.processors import LLAVA_TEMPLATE, llava_processor, write_questions
from tests.zoo.adapt.families import llava
from tools.arank import main

LINES = [{"image": f"{n}.png", "question": "how many" + " many" * n + "?", "answer": "two"} for n in range(6)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    llava().float().save_pretrained(folder)
    llava_processor(LLAVA_TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "data", LINES)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "found" / "arank.json"


def call(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_measures_and_proposes(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, data, "--samples", 4, "--threshold", 0.99, "--device", "cpu", "--out", out) == 0
    result = json.loads(out.read_text())
    assert result["proposed"] == [1, 2] and "proposed: [1, 2]" in capsys.readouterr().out
    names = {"index", "rank_over_length", "stderr", "stable_rank", "entropy", "heads", "chosen", "reason"}
    assert [layer["index"] for layer in result["layers"]] == [0, 1, 2, 3]
    for layer in result["layers"]:
        assert names <= set(layer) and 0 < layer["rank_over_length"] < 1 and layer["stderr"] > 0
        assert layer["chosen"] == (layer["index"] in (1, 2)) and layer["reason"]
    settings = result["settings"]
    expected = {"rtol": 0.01, "samples": 4, "seed": 0, "rows": "all", "attention_dtype": "float32", "dtype": "float32"}
    assert expected.items() <= settings.items() and settings["proposal"] == {"last_layer": False, "threshold": 0.99}
    assert settings["versions"].keys() == {"python", "torch", "transformers"}
    assert result["image_tokens"] == [16] * 4 and len(set(result["tokens"])) == 4
    with Image.open(out.with_suffix(".png")) as picture:
        assert picture.format == "PNG" and picture.width > 300


def test_batches_give_the_same(model: Path, data: Path, out: Path) -> None:
    results = []
    for size in (1, 4):
        assert call(model, data, "--batch", size, "--out", out) == 0
        results.append(json.loads(out.read_text()))
    one, four = results
    assert one["tokens"] == four["tokens"] and len(one["tokens"]) == 6 and one["proposed"] == []
    for a, b in zip(one["layers"], four["layers"], strict=True):
        assert a["rank_over_length"] == pytest.approx(b["rank_over_length"], abs=1e-3)
        assert a["entropy"] == pytest.approx(b["entropy"], rel=1e-4)


def test_proposes_anew_from_a_file(model: Path, data: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(model, data, "--samples", 2, "--heads", 2, "--rows", "image", "--rtol", 0.1, "--out", out) == 0
    first = json.loads(out.read_text())
    assert "no threshold or budget given" in first["layers"][1]["reason"] and len(first["layers"][0]["heads"]) == 2
    again = out.with_name("again.json")
    assert call("--measured", out, "--skip-ratio", 0.3, "--capacity", 0.5, "--last-layer", "--out", again) == 0
    second = json.loads(again.read_text())
    assert len(second["proposed"]) == 3 and 0 not in second["proposed"]
    assert second["layers"][1]["stable_rank"] == first["layers"][1]["stable_rank"]
    assert call("--measured", out, "--flops", 0.9, "--capacity", 0.25, "--out", again) == 0
    assert len(json.loads(again.read_text())["proposed"]) == 2
    capsys.readouterr()
    assert call("--measured", out, "--flops", 0.3, "--out", again) == 2
    assert "0.3 of dense FLOPs at capacity 0.5: needs a saving of 0.700, but all 2 layers" in capsys.readouterr().err


def test_shards(model: Path, tmp_path: Path, out: Path) -> None:
    write_shard(tmp_path / "a-train-0.tar", [sample(f"{n:03d}", png(n), f"number {n}") for n in range(3)])
    assert call(model, tmp_path, "--threshold", 0.5, "--out", out) == 0
    assert json.loads(out.read_text())["settings"]["samples"] == 3


def test_bad_input(model: Path, data: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    text = tmp_path / "text"
    LlamaConfig(vocab_size=64, hidden_size=32, num_attention_heads=4).save_pretrained(text)
    bare = tmp_path / "bare"
    bare.mkdir()
    no_images = write_questions(tmp_path / "no_images", [{"question": "a", "answer": "b"}])
    other = tmp_path / "other"
    llava().float().save_pretrained(other)
    llava_processor(LLAVA_TEMPLATE).save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    config["image_token_index"] = 59
    config.pop("image_token_id", None)
    (other / "config.json").write_text(json.dumps(config))
    out.parent.mkdir()
    out.write_text("{}")
    for arguments, message in [
        ((text, data), f"'{text}' (LlamaConfig) has no image token (config.image_token_id): a text-only model"),
        ((bare, data), f"'{bare}' holds no config.json; give a folder that `save_pretrained` wrote"),
        ((model, bare), "holds neither .jsonl files nor .tar shards"),
        ((model, no_images), f'{no_images}/train.jsonl: none of its 1 lines has an image; some must: {{"image"'),
        ((model, data, "--split", "test"), "test.jsonl: does not exist"),
        (
            (other, data),
            "sample 0 has no image token: the id 59 of the model's config does not occur in its input_ids; give",
        ),
        ((model, data, "--samples", 0), "--samples 0: must be at least 1"),
        ((model, data, "--flops", 1.5), "--flops 1.5: must be between 0 and 1"),
        ((model, data, "--threshold", 2), "--threshold 2: must be between 0 and 1"),
        ((model, data, "--keep", 0.5), "--keep is called --capacity now; write --capacity 0.5"),
        ((model, data, "--capacity", 1), "--capacity 1: must be between 0 and 1"),
        ((model, data, "--rtol", 0), "rtol: 0.0 must be between 0 and 1"),
        ((model, data, "--device", "tpu7"), "--device tpu7: is not to be had"),
        ((model,), "MODEL and DATA are needed"),
        (("--measured", out), "is not a file written by tools.arank"),
        (("--measured", out, "--rtol", 0.1), "--rtol is of a new measurement"),
    ]:
        assert call(*arguments, "--out", tmp_path / "never.json") == 2, message
        assert message in capsys.readouterr().err
    assert not (tmp_path / "never.json").exists()
