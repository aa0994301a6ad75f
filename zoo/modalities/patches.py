"""Image ↔ ids: a k-means codebook of square patches, in raster order; ids are exact, see `codebook.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic
from PIL import Image

from zoo.carries import Ids
from zoo.config import UserError
from zoo.modalities.codebook import Nearest, check_codes, fit_codes, load_codes, save_codes
from zoo.modalities.pictures import Picture, PictureConfig
from zoo.modality import LearnedConfig, LearnedModality
from zoo.registry import register


@register("modality", "patches")
class Patches(Picture, LearnedModality):
    """Nearest-code ids of the patches of an image.

    Args:
        codebook: (codes, dimension) uint8.
    """

    class Config(PictureConfig, LearnedConfig):
        """Patches of `patch`² pixels, each replaced with the nearest of `codes` learned ones.

        `path` is a codebook (safetensors) as `save` writes it.
        """

        file: ClassVar[str] = ".safetensors"
        codes: int = pydantic.Field(default=512, ge=2)
        """Ids of the modality."""

        @property
        def carries(self) -> Ids:
            return Ids(self.codes)

        def fit(self, items: Iterable[Image.Image | np.ndarray]) -> Patches:
            patches = [self.patches(image) for image in items]
            if not patches:
                raise UserError(
                    "there is no image to learn an image codebook from; leave the image modality out, or give its "
                    "`path`"
                )
            return Patches(self, fit_codes(np.concatenate(patches), self.codes))

        def load(self, path: str | Path) -> Patches:
            """Read a codebook.

            Raises:
                UserError: the file is missing, is not a codebook, or was made for another geometry.
            """
            return Patches(self, load_codes(path, self.geometry(), "image"))

        def geometry(self) -> dict[str, str]:
            """What a codebook is made for, by key."""
            values = {
                "image_size": self.image_size,
                "patch": self.patch,
                "codes": self.codes,
                "channels": self.channels,
            }
            return {key: str(value) for key, value in values.items()}

    config: Config

    def __init__(self, config: Config, codebook: np.ndarray) -> None:
        check_codes(codebook, (config.codes, config.dimension))
        super().__init__(config)
        self.codebook = codebook
        content = str(sorted(config.geometry().items())).encode() + codebook.tobytes()
        self._fingerprint = hashlib.sha256(content).hexdigest()
        self._nearest = Nearest(codebook)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, item: Image.Image | np.ndarray) -> np.ndarray:
        """(positions,) int32 ids of a Pillow image or an (H, W[, channels]) uint8 array; ties: the lower id."""
        return self._nearest(self.config.patches(item))

    def decode(self, content: Iterable[int]) -> np.ndarray:
        """(image_size, image_size, channels) uint8 of the ids of all positions.

        Raises:
            ValueError: another number of ids, or an id that is not a code.
        """
        ids, count, codes = np.asarray(content), self.config.positions.most, self.config.codes
        if ids.shape != (count,) or ids.min() < 0 or ids.max() >= codes:
            raise ValueError(f"an image has {count} ids in [0, {codes - 1}]; got {ids.tolist()}")
        return self.config.unpatch(self.codebook[ids])

    def save(self, path: str | Path) -> None:
        """Write the codebook and its geometry as safetensors."""
        save_codes(path, self.codebook, self.config.geometry())
