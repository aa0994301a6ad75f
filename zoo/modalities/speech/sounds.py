"""What all kinds of speech share: a sound from the bytes of a file, one channel at one rate, and a WAV file of it.

A sound is (n,) float32, usually from −1 to 1. Files are opened by soundfile (WAV, FLAC, Ogg, MP3, …) and resampled by
soxr; both come with the extra `speech`. Several channels are mixed down to their mean.
"""

from __future__ import annotations

import io
import math
import struct
from typing import Any, ClassVar

import numpy as np
import pydantic

from zoo.extras import extra
from zoo.modality import Modality, ModalityConfig, Positions

RATES = (1_000, 768_000)
"""Samples per second that a file may have, from and to."""
CHANNELS = 64
"""Most channels of a file."""
BLOCK = 1 << 16
"""Samples that are decoded at a time."""


class SoundError(ValueError):
    """A sound that cannot be used as it is; the message says why."""


def soundfile() -> Any:
    """The library that reads and writes files of sound.

    Raises:
        UserError: it is not installed.
    """
    with extra("speech", "speech"):
        import soundfile
    return soundfile


def open_sound(content: bytes, rate: int, max_seconds: float) -> np.ndarray:
    """A sound, (n,) float32, mixed down to one channel and resampled to `rate`.

    What is too long is refused by what the file says of itself, before it is decoded; and never more than `max_seconds`
    are decoded, whatever it says.

    Args:
        content: of a file.
        rate: samples per second of the result.
        max_seconds: a longer sound is refused.
    Raises:
        SoundError: it is damaged, of no known format, too long, empty or cut short, has an odd rate or too many
            channels, or samples that are no numbers.
        UserError: soundfile or soxr is not installed.
    """
    with extra("speech", "speech"):
        import soxr
    _check_whole(content)
    library = soundfile()
    try:
        with library.SoundFile(io.BytesIO(content)) as file:
            sound, found = _decoded(file, max_seconds), file.samplerate
    except library.LibsndfileError as error:
        raise SoundError(error.error_string) from None
    sound = soxr.resample(sound, found, rate, quality="HQ")
    if not np.isfinite(sound).all():
        raise SoundError("has samples that are no finite numbers")
    if not len(sound):
        raise SoundError(f"has no samples at {rate:,} per second")
    return sound[: math.floor(max_seconds * rate)]


def _decoded(file: Any, max_seconds: float) -> np.ndarray:
    """(n,) float32 of an open file, at its own rate; one block at a time, at most `max_seconds`."""
    if not RATES[0] <= file.samplerate <= RATES[1]:
        raise SoundError(f"has {file.samplerate:,} samples per second; {RATES[0]:,} to {RATES[1]:,} are read")
    if file.channels > CHANNELS:
        raise SoundError(f"has {file.channels} channels; at most {CHANNELS} are read")
    if not file.frames:
        raise SoundError("has no samples")
    limit = math.floor(max_seconds * file.samplerate)
    if file.frames > limit:
        raise SoundError(f"lasts {file.frames / file.samplerate:,.1f} s; max_seconds allows {max_seconds:g}")
    blocks = file.blocks(BLOCK, frames=limit, dtype="float32", always_2d=True)
    sound = np.concatenate([block.mean(axis=1) for block in blocks])
    if len(sound) < file.frames:
        raise SoundError(f"ends after {len(sound):,} of its {file.frames:,} samples")
    return sound


def _check_whole(content: bytes) -> None:
    """Raise `SoundError` for a WAV file that is shorter than it says; the library takes what is there of one."""
    if content[:4] == b"RIFF" and len(content) >= 8:
        said = struct.unpack("<I", content[4:8])[0] + 8
        if len(content) < said < 1 << 31:  # a stream that does not know its length says more
            raise SoundError(f"is cut short: {len(content):,} of its {said:,} bytes are there")


class SoundConfig(ModalityConfig):
    """What all kinds of speech have; every kind has a `rate`, and a `hop` of so many samples for each position."""

    part: ClassVar[str] = "audio"
    suffix: ClassVar[str] = ".wav"
    shorten: ClassVar[str] = "make max_seconds smaller"
    rate: int = pydantic.Field(default=16_000, ge=RATES[0], le=RATES[1])
    """Samples per second that every sound is brought to."""
    max_seconds: float = pydantic.Field(default=15.0, gt=0, le=3600)
    """A document with a longer sound is skipped, counted and named; the sound is not decoded."""

    @property
    def hop(self) -> int:
        """Samples from one position to the next."""
        raise NotImplementedError(f"{type(self).__qualname__} does not say how many samples a position covers")

    @property
    def positions(self) -> Positions:
        """One for each begun `hop`."""
        return Positions(1, self.frames(math.floor(self.max_seconds * self.rate)))

    @property
    def pace(self) -> str:
        return f"{self.rate / self.hop:g} positions a second"

    def frames(self, samples: int) -> int:
        """Positions of so many samples, at least 1."""
        return max(1, -(-samples // self.hop))

    def read(self, content: bytes) -> np.ndarray:
        """The sound of a file; raises what `open_sound` raises."""
        return open_sound(content, self.rate, self.max_seconds)


class Sound(Modality):
    """What all kinds of speech share: an item is a sound at the config's rate, (n,) float32.

    Raises:
        UserError: the extra `speech` is not installed.
    """

    config: SoundConfig

    def __init__(self, config: SoundConfig) -> None:
        soundfile()
        super().__init__(config)

    def write(self, item: np.ndarray) -> bytes:
        """A WAV file of 16 bits; what is louder than 1 is clipped."""
        content = io.BytesIO()
        soundfile().write(content, np.clip(item, -1, 1), self.config.rate, format="WAV", subtype="PCM_16")
        return content.getvalue()
