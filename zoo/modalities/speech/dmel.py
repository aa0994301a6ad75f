"""Sound ↔ channels: the level of each mel channel of a frame, with nothing learned (dMel, arXiv 2407.15835 §2.2)."""

from __future__ import annotations

import numpy as np
import pydantic

from zoo.carries import Channels
from zoo.modalities.speech.sounds import Sound
from zoo.modalities.speech.spectrum import MelConfig, Spectrum
from zoo.registry import register


@register("modality", "dmel")
class DMel(Sound):
    """Frames of mel channels, each at the nearest of some levels."""

    class Config(MelConfig):
        """Sounds as frames of `mels` channels, each at one of `levels` levels of its logarithm.

        A level is (ceiling − floor) / (levels − 1) of the logarithm: by default 0.6, or 12 dB.
        """

        levels: int = pydantic.Field(default=16, ge=2, le=4096)
        """Levels of a channel, evenly from `floor` to `ceiling`."""

        @property
        def carries(self) -> Channels:
            return Channels(self.mels, self.levels)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.spectrum = Spectrum(config)
        self._step = (config.ceiling - config.floor) / (config.levels - 1)

    def encode(self, item: np.ndarray) -> np.ndarray:
        """(f, mels) int32 levels of a sound (n,) float32."""
        return np.rint((self.spectrum.frames(item) - self.config.floor) / self._step).astype(np.int32)

    def decode(self, content: np.ndarray) -> np.ndarray:
        """(f · hop,) float32: a sound of levels (f, mels).

        Raises:
            ValueError: an array of another shape, or a level that is none.
        """
        levels, mels, most = np.asarray(content), self.config.mels, self.config.levels - 1
        if levels.ndim != 2 or levels.shape[1] != mels or not len(levels) or levels.min() < 0 or levels.max() > most:
            raise ValueError(f"a frame has {mels} levels in [0, {most}]; got an array of shape {levels.shape}")
        return self.spectrum.sound(self.config.floor + levels * self._step)
