"""Mel frames against a definition written out, their places, and the way back."""

from __future__ import annotations

import numpy as np
import pytest

from tests.zoo.modalities.speech.waves import RATE, tone, voice
from zoo.config import ConfigError
from zoo.modalities import DMel
from zoo.modalities.speech import Spectrum

CONFIG = DMel.Config(rate=RATE, high=3800.0)
SPECTRUM = Spectrum(CONFIG)


def slaney(frequency: float) -> float:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    return 3 * frequency / 200 if frequency < 1000 else 15 + 27 * np.log(frequency / 1000) / np.log(6.4)


def triangle(frequency: float, low: float, centre: float, high: float) -> float:
    return max(0.0, min((frequency - low) / (centre - low), (high - frequency) / (high - centre))) * 2 / (high - low)


def test_frames_are_their_definition() -> None:
    sound = tone(0.1).astype(np.float64)
    edges = np.interp(np.linspace(slaney(80), slaney(3800), 82), [slaney(f) for f in range(4000)], np.arange(4000.0))
    window = [0.5 - 0.5 * np.cos(2 * np.pi * n / 400) for n in range(400)]
    frames = SPECTRUM.frames(sound)
    assert frames.shape == (4, 80)
    for p in (0, 2):
        start = p * 200 - 100
        piece = np.array([sound[n] if 0 <= n < len(sound) else 0.0 for n in range(start, start + 400)]) * window
        turns = np.exp(-2j * np.pi * np.outer(np.arange(257), np.arange(400)) / 512)
        magnitude = np.abs(turns @ piece)
        for m in (0, 17, 40, 79):
            mel = sum(triangle(k * RATE / 512, *edges[m : m + 3]) * magnitude[k] for k in range(257))
            assert frames[p, m] == pytest.approx(np.log10(max(mel, 1e-7)), abs=2e-3), (p, m)


def test_a_frame_stands_on_its_own_samples() -> None:
    """A click in samples p · hop to (p + 1) · hop is loudest in frame p; n samples have ⌈n / hop⌉ frames."""
    for sample in (10, 190, 210, 990, 1150):
        click = np.zeros(1200)
        click[sample] = 1.0
        frames = SPECTRUM.frames(click)
        assert len(frames) == 6 and frames.mean(1).argmax() == sample // 200
    assert [len(SPECTRUM.frames(np.zeros(n))) for n in (1, 200, 201)] == [1, 1, 2]


def test_there_and_back() -> None:
    """The sound of frames has those frames again, nearly, and is the same sound every time."""
    sound = voice(0.4)
    frames = SPECTRUM.frames(sound)
    again = SPECTRUM.sound(frames)
    assert again.dtype == np.float32 and len(again) == len(frames) * 200
    loud = frames > -1
    assert np.abs(SPECTRUM.frames(again) - frames)[loud].mean() < 0.12, "in units of log10; a level of dMel is 0.6"
    assert np.array_equal(SPECTRUM.sound(frames), again)


@pytest.mark.parametrize("keys", [{"window_ms": 30.0}, {"window_ms": 50.125}, {"hop_ms": 10.0}])
def test_windows_of_any_length(keys: dict[str, float]) -> None:
    spectrum = Spectrum(DMel.Config(rate=RATE, high=3800.0, **keys))
    sound = voice(0.3)
    frames = spectrum.frames(sound)
    again = spectrum.sound(frames)
    assert len(frames) == -(-len(sound) // spectrum.config.hop) and np.isfinite(again).all()
    assert np.abs(spectrum.frames(again) - frames)[frames > -1].mean() < 0.15


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rate": 8000}, r"low 80 and high 7600: must rise, to at most rate / 2 = 4000"),
        ({"low": 8000.0}, r"low 8000 and high 7600: must rise"),
        ({"hop_ms": 25.01}, r"hop_ms 25.01: must be a whole number of samples at 16000 per second"),
        ({"window_ms": 25.0}, r"window_ms 25: must be longer than hop_ms 25"),
        ({"floor": 2.0}, r"floor 2: must be below ceiling 2"),
        ({"max_seconds": 0.0}, r"max_seconds: 0.0: must be greater than 0"),
        ({"rate": 3}, r"rate: 3: must be greater than or equal to 1000"),
    ],
)
def test_keys_that_do_not_fit(keys: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DMel.Config.parse(keys, "modalities.speech")
