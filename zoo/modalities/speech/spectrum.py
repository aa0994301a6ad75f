"""The mel spectrum of a sound, and a sound that has nearly that spectrum (Griffin & Lim 1984; fast: Perraudin 2013).

A frame is the magnitude of a short stretch of sound in some mel channels (Slaney's scale and norm), as its logarithm to
the base of 10. Frame p stands on the middle of samples p · hop to (p + 1) · hop, so n samples have ⌈n / hop⌉ frames.
All is computed in float64, sound by sound.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pydantic
from numpy.lib.stride_tricks import sliding_window_view

from zoo.extras import extra
from zoo.modalities.speech.sounds import SoundConfig

ROUNDS = 60
"""Rounds of Griffin-Lim."""
MOMENTUM = 0.99
FITTING = 30
"""Rounds that fit the spectrum of all frequencies to the mel channels."""
TINY = 1e-10


class MelConfig(SoundConfig):
    """Sounds as frames of mel channels; the defaults are dMel's (arXiv 2407.15835)."""

    shorten = "make max_seconds smaller or hop_ms larger"
    window_ms: float = pydantic.Field(default=50.0, gt=0, le=1000)
    """Milliseconds of sound that a frame looks at, longer than `hop_ms`; a Hann window."""
    hop_ms: float = pydantic.Field(default=25.0, gt=0, le=1000)
    """Milliseconds from one frame to the next; a whole number of samples."""
    mels: int = pydantic.Field(default=80, ge=1, le=1024)
    """Mel channels of a frame."""
    low: float = pydantic.Field(default=80.0, ge=0)
    """Where the lowest channel begins, in Hz."""
    high: float = pydantic.Field(default=7600.0, gt=0)
    """Where the highest channel ends, in Hz; at most half of `rate`."""
    floor: float = -7.0
    """Logarithm of the magnitude, to the base of 10, below which nothing is told apart."""
    ceiling: float = 2.0
    """The same above which nothing is."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> MelConfig:
        if not self.low < self.high <= self.rate / 2:
            raise ValueError(
                f"low {self.low:g} and high {self.high:g}: must rise, to at most rate / 2 = {self.rate / 2:g}"
            )
        for key, value in (("hop_ms", self.hop_ms), ("window_ms", self.window_ms)):
            if (value * self.rate / 1000) % 1:
                raise ValueError(f"{key} {value:g}: must be a whole number of samples at {self.rate} per second")
        if self.window_ms <= self.hop_ms:
            raise ValueError(f"window_ms {self.window_ms:g}: must be longer than hop_ms {self.hop_ms:g}")
        if self.floor >= self.ceiling:
            raise ValueError(f"floor {self.floor:g}: must be below ceiling {self.ceiling:g}")
        return self

    @property
    def hop(self) -> int:
        return round(self.hop_ms * self.rate / 1000)

    @property
    def window(self) -> int:
        """Samples that a frame looks at."""
        return round(self.window_ms * self.rate / 1000)

    def geometry(self) -> dict[str, str]:
        """What decides the frames of a sound, by key."""
        keys = MelConfig.model_fields.keys() - {"max_seconds"}
        return {key: str(getattr(self, key)) for key in sorted(keys)}


class Spectrum:
    """From sounds to frames and back, as a config says."""

    def __init__(self, config: MelConfig) -> None:
        self.config = config
        self.bins = 1 << (config.window - 1).bit_length()
        """Samples of the Fourier transform: the next power of two."""
        self.shape = np.hanning(config.window + 1)[:-1]

    @functools.cached_property
    def mels(self) -> np.ndarray:
        """(bins / 2 + 1, mels) weights of the frequencies in each channel."""
        with extra("speech", "speech"):
            from transformers.audio_utils import mel_filter_bank
        config = self.config
        return mel_filter_bank(
            self.bins // 2 + 1, config.mels, config.low, config.high, config.rate, norm="slaney", mel_scale="slaney"
        )

    def frames(self, sound: np.ndarray) -> np.ndarray:
        """(f, mels) float64 from `floor` to `ceiling` of a sound (n,)."""
        magnitude = np.abs(self._transform(sound, self.config.frames(len(sound))))
        logarithm = np.log10(np.maximum(magnitude @ self.mels, TINY))
        return np.clip(logarithm, self.config.floor, self.config.ceiling)

    def sound(self, frames: np.ndarray) -> np.ndarray:
        """(f · hop,) float32: a sound whose frames are nearly `frames` (f, mels). The same frames give the same sound.

        The phases are found by Griffin-Lim, from a start at random (of a fixed seed).
        """
        magnitude = self._magnitude(10.0 ** np.asarray(frames, np.float64))
        phase = np.exp(2j * np.pi * np.random.RandomState(0).random_sample(magnitude.shape))
        before: Any = 0.0
        for _ in range(ROUNDS):
            again = self._transform(self._inverse(magnitude * phase), len(frames))
            phase = again - MOMENTUM / (1 + MOMENTUM) * before
            phase, before = phase / np.maximum(np.abs(phase), TINY), again
        return self._inverse(magnitude * phase).astype(np.float32)

    def _magnitude(self, mels: np.ndarray) -> np.ndarray:
        """(f, bins / 2 + 1) ≥ 0 whose channels come near `mels` (f, mels): least squares by multiplicative updates."""
        weights = self.mels
        found = mels @ weights.T + TINY
        for _ in range(FITTING):
            found = found * (mels @ weights.T + TINY) / (found @ weights @ weights.T + TINY)
        return found

    def _transform(self, sound: np.ndarray, frames: int) -> np.ndarray:
        """(f, bins / 2 + 1) complex spectra of the windows of a sound."""
        hop, window = self.config.hop, self.config.window
        left = (window - hop) // 2
        padded = np.pad(sound.astype(np.float64), (left, frames * hop + window - hop - left - len(sound)))
        return np.fft.rfft(sliding_window_view(padded, window)[::hop] * self.shape, self.bins)

    def _inverse(self, spectra: np.ndarray) -> np.ndarray:
        """(f · hop,) the sound whose windows have nearly these spectra: overlap and add."""
        hop, window = self.config.hop, self.config.window
        pieces = np.fft.irfft(spectra, self.bins)[:, :window] * self.shape
        sound, weight = (np.zeros(len(spectra) * hop + window - hop) for _ in range(2))
        for number, piece in enumerate(pieces):
            sound[number * hop : number * hop + window] += piece
            weight[number * hop : number * hop + window] += self.shape**2
        left = (window - hop) // 2
        return (sound / np.maximum(weight, TINY))[left : left + len(spectra) * hop]
