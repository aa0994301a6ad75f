"""Spoken digits: recordings and shards become the same documents; what a model hears of them, and what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import zoo
from pretrain import recipe as recipes
from pretrain.data import open_data
from pretrain.describe import objective_of
from tests.pretrain.data.samples import write_shard
from tools.evaluate.judging import FRAMES
from tools.examples import make_spoken_digits
from tools.examples.judge_spoken_digits import SAMPLES, Judge, evaluate
from tools.examples.make_digits import NAMES
from tools.examples.make_spoken_digits import takes, write


def test_recordings_become_two_documents_each(recordings: Path, tmp_path: Path) -> None:
    counts = write(recordings, tmp_path / "out")
    assert counts == {"train": 2 * 30, "val": 2 * 50}
    for split, held_out in (("train", False), ("val", True)):
        read = list(webdataset.WebDataset(str(tmp_path / "out" / f"spoken-{split}-000.tar"), shardshuffle=False))
        for item in read:
            digit, _, index = item["__key__"].rsplit("-", 1)[0].split("_")
            assert (int(index) < 5) is held_out
            parts = json.loads(item["json"])["parts"]
            kinds = [part["type"] for part in parts]
            assert kinds == (["audio", "text"] if item["__key__"].endswith("read") else ["text", "audio"])
            text = next(part["text"] for part in parts if part["type"] == "text")
            assert text == NAMES[int(digit)]
            assert item["wav"] == (recordings / f"{item['__key__'].rsplit('-', 1)[0]}.wav").read_bytes()
        assert len(read) == counts[split]


def test_shards_of_takes_are_read_too(recordings: Path, tmp_path: Path) -> None:
    every = list(takes(recordings))
    for split, held_out in (("train", False), ("val", True)):
        documents = [
            {
                "__key__": take.key,
                "json": json.dumps(
                    {"parts": [{"type": "audio", "file": "0.wav"}, {"type": "text", "text": take.word}]}
                ).encode(),
                "0.wav": take.sound,
            }
            for take in every
            if take.held_out is held_out
        ]
        write_shard(tmp_path / f"{split}.tar", documents)
    assert sorted(takes(tmp_path)) == sorted(every)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no shard|matches"),
        ({"a.wav": b""}, "no shard|matches"),
        ({"0_a_0.wav": b""}, "has 0 takes to train on and 1 held out; both are needed"),
    ],
)
def test_folders_without_takes(
    tmp_path: Path, content: dict[str, bytes], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    assert make_spoken_digits.main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert re.search(message, capsys.readouterr().err)
    assert make_spoken_digits.main([str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert "does not exist, or is not a folder" in capsys.readouterr().err


def test_the_judge_tells_words_apart(recordings: Path) -> None:
    config = zoo.modalities.DMel.Config(rate=8000, high=3800.0)
    every = list(takes(recordings))
    judge = Judge(config, every)
    held_out = [(take.word, config.read(take.sound)) for take in every if take.held_out]
    assert judge.accuracy(held_out) > 0.9
    assert judge.accuracy([("one", sound) for _, sound in held_out]) == pytest.approx(0.1, abs=0.05)
    assert judge.sounds.rows([held_out[0][1]]).shape == (1, 40 * FRAMES)


@pytest.mark.parametrize("speech", [{"type": "dmel", "mels": 8}, {"type": "units", "units": 16, "mels": 8}])
def test_a_model_is_asked(recordings: Path, tmp_path: Path, speech: dict[str, Any]) -> None:
    """Figures and sounds of a model that has learned nothing, whatever its positions carry."""
    write(recordings, tmp_path)
    recipe = recipes.resolve(
        {
            "name": "spoken",
            "modalities": {
                "text": {"type": "bytes"},
                "speech": speech | {"rate": 8000, "high": 3800.0, "max_seconds": 1.0},
            },
            "model": {"d_model": 16, "layers": [{"mixer": {"type": "attention", "heads": 2}}]},
            "data": {"path": str(tmp_path), "sequence_length": 64},
            "optimizer": {"lr": 1e-3},
            "train": {"steps": 1, "global_batch": 1, "micro_batch": 1},
        }
    )
    data = open_data(recipe.data, recipe.modalities, 0, log=lambda text: None)
    model: Any = zoo.build("model", recipe.model, seed=0).eval()
    some = [take for take in takes(recordings) if not take.held_out or take.key.endswith("_0")]
    run = zoo.Run(tmp_path, model, data.modalities, objective_of(recipe), recipe.data.sequence_length)
    found = evaluate(run, some, 0)
    low, high = found.summary["word_accuracy_interval"]
    assert found.summary["held_out_takes"] == 10 and 0 <= low <= found.summary["word_accuracy"] <= high <= 1
    assert found.summary["classifier_accuracy_on_held_out"] == 1.0
    assert found.summary["positions_that_survive_a_round_trip"] > 0.5
    assert {label: len(pictures) for label, pictures in found.round_trip.items()} == {"recorded": 10, "positions": 10}
    assert len(found.spoken) == 10 * SAMPLES and {each.word for each in found.spoken} == set(NAMES)
    assert all(each.sound.dtype == np.float32 and each.picture.dtype == np.uint8 for each in found.spoken)
