"""Image ↔ vectors: the pixels of square patches as they are, in raster order, with nothing learned and nothing lost."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from zoo.carries import Vectors
from zoo.modalities.pictures import Picture, PictureConfig
from zoo.registry import register


@register("modality", "continuous_patches")
class ContinuousPatches(Picture):
    """Patches as vectors of pixels from −1 (black) to 1 (white)."""

    class Config(PictureConfig):
        """Patches of `patch`² pixels, each a vector of `patch`² × `channels` numbers."""

        mask: Literal["causal", "bidirectional"] = "causal"
        """What a patch sees of its own image: the patches before it, or all of them, as an objective needs that
        denoises a whole image at once. What it sees of the rest of its document stands before it in any case."""

        @property
        def carries(self) -> Vectors:
            return Vectors(self.dimension)

        @property
        def bidirectional(self) -> bool:
            return self.mask == "bidirectional"

    config: Config

    def encode(self, item: Image.Image | np.ndarray) -> np.ndarray:
        """(positions, dimension) float32 of a Pillow image or an (H, W[, channels]) uint8 array."""
        return self.config.patches(item).astype(np.float32) / np.float32(127.5) - np.float32(1)

    def decode(self, content: np.ndarray) -> np.ndarray:
        """(image_size, image_size, channels) uint8 of the vectors of all positions; what lies outside [−1, 1] is
        clipped.

        Raises:
            ValueError: an array of another shape.
        """
        vectors, shape = np.asarray(content, np.float32), (self.config.positions.most, self.config.dimension)
        if vectors.shape != shape:
            raise ValueError(f"an image has vectors of shape {shape}; got {vectors.shape}")
        pixels = np.rint((vectors + np.float32(1)) * np.float32(127.5))
        return self.config.unpatch(np.clip(pixels, 0, 255).astype(np.uint8))
