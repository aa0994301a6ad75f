"""Sounds as they are found: channels, rates, depths, formats, and what is no sound."""

from __future__ import annotations

import builtins
import io
import struct

import numpy as np
import pytest
import soundfile

from tests.zoo.modalities.speech.waves import RATE, file, tone
from zoo.config import UserError
from zoo.modalities import DMel
from zoo.modalities.speech import SoundError, open_sound

WAVE = tone()


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (file(WAVE, subtype="PCM_16"), 1e-4),
        (file(WAVE, subtype="PCM_24"), 1e-6),
        (file(WAVE, subtype="FLOAT"), 0),
        (file(WAVE, subtype="PCM_U8"), 1e-2),
        (file(WAVE, subtype="ULAW"), 2e-2),
        (file(WAVE, kind="FLAC"), 1e-4),
        (file(WAVE, kind="AIFF"), 1e-4),
        (file(np.stack([2 * WAVE, np.zeros_like(WAVE)], 1), subtype="FLOAT"), 0),
        (file(np.stack([WAVE] * 6, 1), subtype="FLOAT"), 1e-7),
    ],
    ids=["16", "24", "float", "8", "µ-law", "FLAC", "AIFF", "stereo", "six channels"],
)
def test_a_tone_stays_a_tone(content: bytes, tolerance: float) -> None:
    """Several channels are their mean."""
    sound = open_sound(content, RATE, 1.0)
    assert sound.dtype == np.float32 and sound.shape == WAVE.shape
    assert np.abs(sound - WAVE).max() <= tolerance


@pytest.mark.parametrize("rate", [4000, 11_025, 16_000, 44_100, 48_000])
def test_every_rate_is_brought_to_one(rate: int) -> None:
    """The tone lies below half of the lowest rate."""
    sound = open_sound(file(tone(rate=rate), rate, subtype="FLOAT"), RATE, 1.0)
    assert abs(len(sound) - len(WAVE)) <= 1
    middle = slice(200, 3800)
    assert np.abs(sound[middle] - WAVE[middle]).max() < 2e-3


def test_what_is_lossy_is_read() -> None:
    for kind, subtype in (("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")):
        sound = open_sound(file(tone(rate=44_100), 44_100, kind, subtype), RATE, 2.0)
        assert np.abs(np.fft.rfft(sound)).argmax() / len(sound) * RATE == pytest.approx(440, abs=5)


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_rate(rate: int) -> bytes:
    content = file(WAVE)
    return content[:24] + struct.pack("<I", rate) + content[28:]


BAD = {
    "empty file": (b"", "Format not recognised"),
    "no sound": (b"words, not sound" * 100, "Format not recognised"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "Format not recognised"),
    "no samples": (file(WAVE[:0]), "has no samples"),
    "one sample at a high rate": (file(WAVE[:1], 48_000), "has no samples at 8,000 per second"),
    "too long": (file(tone(2.0)), r"lasts 2.0 s; max_seconds allows 1"),
    "too long, compressed": (file(np.zeros(RATE * 3000, np.float32), kind="FLAC"), r"lasts 3,000.0 s; max_seconds"),
    "cut short": (cut_short(file(WAVE)), r"is cut short: 4,022 of its 8,044 bytes are there"),
    "cut short, FLAC": (cut_short(file(WAVE, kind="FLAC")), "flac decoder lost sync"),
    "an odd rate": (with_rate(3), "has 3 samples per second; 1,000 to 768,000 are read"),
    "many channels": (file(np.zeros((50, 65), np.float32)), "has 65 channels; at most 64 are read"),
    "no numbers": (file(np.where(np.arange(4000) == 7, np.nan, WAVE), subtype="FLOAT"), "no finite numbers"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_sound_is_named(content: bytes, message: str) -> None:
    with pytest.raises(SoundError, match=message):
        open_sound(content, RATE, 1.0)


def test_a_long_sound_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    content = file(np.zeros(RATE * 3000, np.float32), kind="FLAC")
    assert len(content) < 1 << 17, "a small file"
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("decoded"))
    with pytest.raises(SoundError, match="lasts 3,000"):
        open_sound(content, RATE, 1.0)


def test_silence_is_a_sound() -> None:
    assert not open_sound(file(np.zeros(4000, np.float32)), RATE, 1.0).any()


def test_what_is_written_is_read_again() -> None:
    kind = DMel(DMel.Config(rate=RATE, high=3800))
    content = kind.write(WAVE)
    assert np.abs(kind.config.read(content) - WAVE).max() < 1e-4
    with soundfile.SoundFile(io.BytesIO(content)) as written:
        assert (written.samplerate, written.channels, written.subtype) == (RATE, 1, "PCM_16")
    assert np.abs(kind.config.read(kind.write(3 * WAVE))).max() <= 1


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "soundfile":
            raise ImportError("No module named 'soundfile'")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"^speech: No module named 'soundfile'; pip install -e .\[speech\]"):
        DMel(DMel.Config())
