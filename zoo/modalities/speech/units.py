"""Sound ↔ ids: the nearest of some k-means codes for each frame of mel channels; ids are exact, see `codebook.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic

from zoo.carries import Ids
from zoo.config import UserError
from zoo.modalities.codebook import Nearest, check_codes, fit_codes, load_codes, save_codes
from zoo.modalities.speech.sounds import Sound
from zoo.modalities.speech.spectrum import MelConfig, Spectrum
from zoo.modality import LearnedConfig, LearnedModality
from zoo.registry import register


@register("modality", "units")
class Units(Sound, LearnedModality):
    """Nearest-code ids of the frames of a sound.

    Args:
        codebook: (units, mels) uint8; a logarithm from `floor` to `ceiling` is 0 to 255.
    """

    class Config(MelConfig, LearnedConfig):
        """Frames of mel channels, each replaced with the nearest of `units` learned ones.

        `path` is a codebook (safetensors) as `save` writes it.
        """

        file: ClassVar[str] = ".safetensors"
        fit_limit: ClassVar[int] = 1 << 18
        units: int = pydantic.Field(default=500, ge=2)
        """Ids of the modality."""

        @property
        def carries(self) -> Ids:
            return Ids(self.units)

        def extent(self, item: np.ndarray) -> int:
            """Frames of the sound."""
            return self.frames(len(item))

        def fit(self, items: Iterable[np.ndarray]) -> Units:
            spectrum = Spectrum(self)
            frames = [_eight_bits(spectrum, sound) for sound in items]
            if not frames:
                raise UserError("there is no sound to learn units from; leave the modality out, or give its `path`")
            return Units(self, fit_codes(np.concatenate(frames), self.units))

        def load(self, path: str | Path) -> Units:
            """Read a codebook.

            Raises:
                UserError: the file is missing, is not a codebook, or was made for other frames.
            """
            return Units(self, load_codes(path, self._made_for(), "unit"))

        def _made_for(self) -> dict[str, str]:
            return {"units": str(self.units)} | self.geometry()

    config: Config

    def __init__(self, config: Config, codebook: np.ndarray) -> None:
        check_codes(codebook, (config.units, config.mels))
        super().__init__(config)
        self.codebook = codebook
        self.spectrum = Spectrum(config)
        content = str(sorted(config._made_for().items())).encode() + codebook.tobytes()
        self._fingerprint = hashlib.sha256(content).hexdigest()
        self._nearest = Nearest(codebook)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, item: np.ndarray) -> np.ndarray:
        """(f,) int32 ids of a sound (n,) float32; ties: the lower id."""
        return self._nearest(_eight_bits(self.spectrum, item))

    def decode(self, content: Iterable[int]) -> np.ndarray:
        """(f · hop,) float32: a sound of ids (f,).

        Raises:
            ValueError: no ids, or an id that is not a code.
        """
        ids, units = np.asarray(content), self.config.units
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= units:
            raise ValueError(f"a sound has ids in [0, {units - 1}], at least one; got {ids.tolist()}")
        config = self.config
        return self.spectrum.sound(config.floor + self.codebook[ids] * (config.ceiling - config.floor) / 255)

    def save(self, path: str | Path) -> None:
        """Write the codebook and the frames that it is for as safetensors."""
        save_codes(path, self.codebook, self.config._made_for())


def _eight_bits(spectrum: Spectrum, sound: np.ndarray) -> np.ndarray:
    """(f, mels) uint8 of a sound's frames, from `floor` to `ceiling`."""
    config = spectrum.config
    return np.rint((spectrum.frames(sound) - config.floor) / (config.ceiling - config.floor) * 255).astype(np.uint8)
