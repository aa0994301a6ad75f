"""What all kinds of image modality share: a picture from bytes, its square, and its patches in raster order."""

from __future__ import annotations

import io
from typing import ClassVar, Literal

import numpy as np
import pydantic
from PIL import Image, ImageOps

from zoo.modalities.modality import ModalityConfig, Positions
from zoo.slots import Modality


def open_picture(content: bytes) -> Image.Image:
    """A fully decoded picture; raises what Pillow raises."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def upright(image: Image.Image, mode: Literal["L", "RGB"]) -> Image.Image:
    """The picture as it is meant to be seen: turned as its EXIF orientation says, transparent parts on white.

    Args:
        mode: of the result, grey or colour.
    """
    image = ImageOps.exif_transpose(image)
    keyed = image.mode in ("1", "L", "P", "RGB") and "transparency" in image.info
    if keyed or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


class PictureConfig(ModalityConfig):
    """Square pictures cut into square patches."""

    part: ClassVar[str] = "image"
    suffix: ClassVar[str] = ".png"
    shorten: ClassVar[str] = "make patch larger or image_size smaller"
    image_size: pydantic.PositiveInt = 32
    """Side in pixels of the square that every image is brought to (short side resized, centre cropped)."""
    patch: pydantic.PositiveInt = 4
    """Side of a patch in pixels; divides image_size."""
    channels: Literal[1, 3] = 3
    """3 (colour) or 1 (grey)."""

    @pydantic.field_validator("patch")
    @classmethod
    def _divides(cls, patch: int, info: pydantic.ValidationInfo) -> int:
        image_size = info.data.get("image_size", patch)
        if image_size % patch:
            raise ValueError(f"does not divide image_size = {image_size}; choose a divisor of it")
        return patch

    @property
    def positions(self) -> Positions:
        """One a patch."""
        count = (self.image_size // self.patch) ** 2
        return Positions(count, count)

    @property
    def dimension(self) -> int:
        """Numbers in one patch."""
        return self.patch**2 * self.channels

    def read(self, content: bytes) -> np.ndarray:
        """The square of a picture in any format that Pillow reads; raises what Pillow raises."""
        return self.square(open_picture(content))

    def square(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The image as the modality sees it: (image_size, image_size, channels) uint8.

        An image whose short side is image_size already is not resampled.

        Args:
            image: a Pillow image, or (H, W), (H, W, 1) or (H, W, 3) uint8.
        """
        if isinstance(image, np.ndarray):
            if image.dtype == np.uint8 and image.shape == (self.image_size, self.image_size, self.channels):
                return image
            image = _from_array(image)
        image = upright(image, "L" if self.channels == 1 else "RGB")
        short = min(image.size)
        if short != self.image_size:
            width, height = (max(self.image_size, round(side * self.image_size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - self.image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(image, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)

    def patches(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """(positions, dimension) uint8: the patches of `image` in raster order."""
        side = self.image_size // self.patch
        grid = self.square(image).reshape(side, self.patch, side, self.patch, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(side * side, self.dimension)

    def unpatch(self, patches: np.ndarray) -> np.ndarray:
        """The inverse of `patches`: (image_size, image_size, channels) uint8."""
        side = self.image_size // self.patch
        grid = patches.reshape(side, side, self.patch, self.patch, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(self.image_size, self.image_size, self.channels)


class Picture(Modality):
    """What all kinds of image modality share: an item is (image_size, image_size, channels) uint8."""

    def write(self, item: np.ndarray) -> bytes:
        """A PNG file."""
        content = io.BytesIO()
        _from_array(item).save(content, "PNG")
        return content.getvalue()


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image; "
            "it needs (H, W), (H, W, 1) or (H, W, 3) and uint8"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
