"""dMel: levels, places, round trips, errors."""

from __future__ import annotations

import numpy as np
import pytest

from tests.zoo.modalities.speech.waves import RATE, file, tone, voice
from zoo.modalities import Channels, DMel, Positions

KIND = DMel(DMel.Config(rate=RATE, high=3800.0, max_seconds=1.0))


def test_defaults_are_the_papers() -> None:
    config = DMel.Config()
    assert config.carries == Channels(80, 16) and config.pace == "40 positions a second"
    assert (config.hop, config.window) == (400, 800)
    assert DMel(config)._step == pytest.approx(0.6)


def test_levels_are_the_nearest() -> None:
    frames = KIND.spectrum.frames(tone())
    levels = KIND.encode(tone())
    assert levels.dtype == np.int32 and levels.shape == (20, 80)
    values = -7 + 0.6 * np.arange(16)
    assert np.array_equal(levels, np.abs(frames[..., None] - values).argmin(-1))


def test_there_and_back() -> None:
    levels = KIND.encode(voice())
    again = KIND.encode(KIND.decode(levels))
    assert (again == levels).mean() > 0.85 and np.abs(again - levels).mean() < 0.2


def test_silence_and_its_way_back() -> None:
    levels = KIND.encode(KIND.config.read(file(np.zeros(4000, np.float32))))
    assert not levels.any() and np.abs(KIND.decode(levels)).max() < 1e-6


def test_positions_hold_the_longest() -> None:
    assert KIND.config.positions == Positions(1, 40)
    assert len(KIND.encode(KIND.config.read(file(tone(1.0))))) == 40
    assert len(KIND.encode(KIND.config.read(file(tone(1.0, 44_100), 44_100)))) == 40
    assert len(KIND.encode(tone(0.5)[:1])) == 1


@pytest.mark.parametrize(
    "content", [np.zeros((3, 79), int), np.zeros((0, 80), int), np.full((2, 80), 16), -np.ones((1, 80))]
)
def test_levels_that_are_none(content: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a frame has 80 levels in \[0, 15\]; got an array of shape"):
        KIND.decode(content)


def test_the_fingerprint_tells_frames_apart() -> None:
    prints = {DMel(DMel.Config(**keys)).fingerprint for keys in ({}, {"levels": 8}, {"mels": 40}, {"hop_ms": 12.5})}
    assert len(prints) == 4
