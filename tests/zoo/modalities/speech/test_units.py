"""Units: learned once, the nearest code, round trips, files, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.zoo.modalities.speech.waves import RATE, voice
from zoo.config import UserError
from zoo.modalities import Ids, Units

CONFIG = Units.Config(rate=RATE, high=3800.0, units=24, hop_ms=40.0, window_ms=60.0)
SOUNDS = [voice(0.5, hertz) for hertz in (200, 300, 500, 800, 1200)]


def test_codes_are_the_nearest_and_the_same_every_time() -> None:
    kind = CONFIG.fit(SOUNDS)
    assert CONFIG.carries == Ids(24) and CONFIG.pace == "25 positions a second"
    ids = kind.encode(SOUNDS[2])
    assert ids.dtype == np.int32 and ids.shape == (13,) and len(set(ids.tolist())) > 2
    frames = np.rint((kind.spectrum.frames(SOUNDS[2]) + 7) / 9 * 255)
    distance = ((frames[:, None] - kind.codebook[None].astype(float)) ** 2).sum(-1)
    assert np.array_equal(ids, distance.argmin(-1))
    assert CONFIG.fit(SOUNDS).fingerprint == kind.fingerprint != CONFIG.fit(SOUNDS[1:]).fingerprint


def test_there_and_back() -> None:
    kind = CONFIG.fit(SOUNDS)
    ids = kind.encode(SOUNDS[1])
    sound = kind.decode(ids)
    assert len(sound) == len(ids) * CONFIG.hop and np.abs(sound).max() > 0.1
    assert (kind.encode(sound) == ids).mean() > 0.7
    with pytest.raises(ValueError, match=r"a sound has ids in \[0, 23\], at least one; got \[24\]"):
        kind.decode([24])
    with pytest.raises(ValueError, match="at least one; got"):
        kind.decode([])


def test_a_codebook_is_a_file(tmp_path: Path) -> None:
    kind = CONFIG.fit(SOUNDS)
    kind.save(tmp_path / "speech.safetensors")
    assert CONFIG.load(tmp_path / "speech.safetensors").fingerprint == kind.fingerprint
    longer = CONFIG.model_copy(update={"max_seconds": 30.0})
    assert longer.load(tmp_path / "speech.safetensors").fingerprint == kind.fingerprint
    other = CONFIG.model_copy(update={"mels": 40})
    with pytest.raises(UserError, match="was made with mels 80, the config says 40; make them equal"):
        other.load(tmp_path / "speech.safetensors")
    with pytest.raises(UserError, match=r"unit codebook .*nowhere does not exist"):
        CONFIG.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no sound to learn units from"):
        CONFIG.fit([])
