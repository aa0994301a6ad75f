"""Sounds in shards: what is used becomes rows, what cannot be used is skipped, counted and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.data import DataConfig, micro_batches, open_data
from tests.pretrain.data.samples import write_shard
from tests.zoo.modalities.speech.waves import RATE, file, voice
from zoo.modalities import parse_modalities

SPEECH = {"type": "dmel", "rate": RATE, "high": 3800.0, "mels": 8, "max_seconds": 1.0}
GOOD = {
    "mono": file(voice()),
    "stereo": file(np.stack([voice(), voice()], 1)),
    "silent": file(np.zeros(2000, np.float32)),
    "flac": file(voice(), kind="FLAC"),
    "resampled": file(voice(), rate=16_000),
}
BAD = {
    "words": (b"no sound", "0.wav does not decode (SoundError: Format not recognised.)"),
    "nothing": (b"", "0.wav does not decode (SoundError: Format not recognised.)"),
    "empty": (file(voice()[:0]), "0.wav does not decode (SoundError: has no samples)"),
    "cut": (
        file(voice())[:3000],
        "0.wav does not decode (SoundError: is cut short: 3,000 of its 8,044 bytes are there)",
    ),
    "long": (
        file(np.zeros(RATE * 60, np.float32), kind="FLAC"),
        "0.wav does not decode (SoundError: lasts 60.0 s; max_seconds allows 1)",
    ),
}


def document(key: str, sound: bytes) -> dict[str, bytes]:
    parts = [{"type": "audio", "file": "0.wav"}, {"type": "text", "text": key}]
    return {"__key__": key, "json": json.dumps({"parts": parts}).encode(), "0.wav": sound}


def opened(folder: Path, speech: dict[str, Any], broken: int) -> Any:
    modalities = parse_modalities({"text": {"type": "bytes"}, "speech": speech})
    config = DataConfig(path=str(folder), validation=None, sequence_length=64, max_broken_documents=broken)
    return open_data(config, modalities, seed=0, log=lambda line: None)


def test_good_and_bad_sounds(tmp_path: Path) -> None:
    sounds = GOOD | {key: sound for key, (sound, _) in BAD.items()}
    write_shard(tmp_path / "train.tar", [document(key, sound) for key, sound in sounds.items()])
    data = opened(tmp_path, SPEECH, broken=len(BAD))
    assert {skipped.key: skipped.reason for skipped in data.skipped} == {
        key: reason for key, (_, reason) in BAD.items()
    }
    kind = data.modalities["speech"]
    expected = {key: kind.encode(kind.config.read(sound)) for key, sound in GOOD.items()}
    found = {}
    for number in range(data.train.rows_per_epoch):
        row = data.train.row(number)
        taken = iter(row.content["speech"])
        for piece in range(int(row.document.max()) + 1):
            tokens = row.tokens[row.document == piece]
            key = kind_of_text(data, tokens)
            found[key] = np.array(
                [next(taken) for _ in range(int((tokens == data.vocabulary.range("speech")[0]).sum()))]
            )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    (batch,) = micro_batches(data.train, range(1), 1)
    assert batch.content["speech"].shape[1] == 8 and batch.content["speech"].max() < 16


def kind_of_text(data: Any, tokens: np.ndarray) -> str:
    start, stop = data.vocabulary.range("text")
    return data.modalities["text"].decode(tokens[(tokens >= start) & (tokens < stop)] - start)


def test_units_are_learned_from_the_shards_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "train.tar", [document(f"{n}", file(voice(hertz=200.0 + 20 * n))) for n in range(8)])
    units = {"type": "units", "units": 12} | {key: value for key, value in SPEECH.items() if key != "type"}
    first, again = (opened(tmp_path, units, broken=0) for _ in range(2))
    assert first.fingerprint == again.fingerprint
    tokens = first.train.row(0).tokens
    start, stop = first.vocabulary.range("speech")
    assert stop - start == 12 and ((tokens >= start) & (tokens < stop)).sum() >= 20


def test_a_codec_that_does_not_fit_is_one_error(tmp_path: Path) -> None:
    from zoo.config import UserError

    write_shard(tmp_path / "train.tar", [document("one", file(voice()))])
    codec = {"type": "codec", "path": str(tmp_path / "nowhere"), "codebooks": 2, "codes": 8, "hop_samples": 160}
    with pytest.raises(UserError, match=r"^codec folder .*nowhere: config.json cannot be read"):
        opened(tmp_path, codec | {"rate": RATE, "max_seconds": 1.0}, broken=5)
