"""Files of sound, written on the spot."""

from __future__ import annotations

import io

import numpy as np
import soundfile

RATE = 8000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    """(n,) float32: a tone with three overtones that swells and fades."""
    time = np.arange(round(seconds * rate)) / rate
    wave = sum(np.sin(2 * np.pi * hertz * k * time) / k for k in (1, 2, 3, 4))
    return (0.3 * wave * np.sin(np.pi * time / seconds)).astype(np.float32)


def voice(seconds: float = 0.5, hertz: float = 300.0) -> np.ndarray:
    """(n,) float32: a tone in noise, so that no channel is silent."""
    wave = tone(seconds, hertz=hertz)
    return wave + np.random.RandomState(0).normal(0, 0.02, len(wave)).astype(np.float32)


def file(sound: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    """The sound (n,) or (n, channels) as the content of a file."""
    content = io.BytesIO()
    soundfile.write(content, sound, rate, format=kind, subtype=subtype)
    return content.getvalue()
