"""What all kinds of image modality share: a picture from bytes, its square, and its patches in raster order.

Pretraining and fine-tuning open pictures with the same function, `open_picture`: upright, in 8 bits, on white.
"""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pydantic
from PIL import ExifTags, Image

from zoo.modality import Modality, ModalityConfig, Positions

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
"""What is opened, named as Pillow names it; the content decides, never a file's name. Others, such as EPS, would start
programs or are no pictures of pixels."""
MEGAPIXEL = 1_000_000
MAX_MEGAPIXELS = 64
"""Most pixels of a picture, in millions, where nobody sets another limit; a photograph of 8,000 × 8,000."""
PILLOW_LIMIT = 178_956_970
"""Pixels from which on Pillow refuses a picture itself."""
LARGE = 1 << 22
"""Pixels from which on pictures are decoded one at a time, so that many threads need no more memory than one."""
STRIP = 32
"""Where a resized picture would be longer than this many squares, only its middle square is made."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the picture upright."""

_one_at_a_time = threading.Lock()


class PictureError(ValueError):
    """A picture that cannot be used as it is; the message says why."""


def open_picture(
    source: bytes | Path, max_pixels: int = MAX_MEGAPIXELS * MEGAPIXEL, key: str = "the limit"
) -> Image.Image:
    """A picture, fully decoded, upright, with 8 bits a channel, on white where it is transparent.

    Args:
        source: the content of a file, or the file.
        max_pixels: a picture with more is not decoded.
        key: what the message calls the limit: the recipe's key.
    Raises:
        PictureError: too many pixels, or pixels that have no meaning as colours.
        Exception: whatever Pillow raises for a file that is damaged or of no format in `FORMATS`.
    """
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.DecompressionBombError:
        raise PictureError(f"has more than {PILLOW_LIMIT:,} pixels; {key} allows {max_pixels:,}") from None
    with image:
        width, height = image.size
        if width * height > max_pixels:
            raise PictureError(f"has {width:,} × {height:,} pixels; {key} allows {max_pixels:,}")
        if width * height < LARGE:
            return plain(image)
        with _one_at_a_time:
            return plain(image)


def plain(image: Image.Image) -> Image.Image:
    """The picture upright, with 8 bits a channel, on white where it is transparent. A plain one is returned as it is.

    Raises:
        PictureError: its pixels have no meaning as colours.
    """
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Pillow's own `exif_transpose` also writes the EXIF block anew, which fails wherever a field of it is malformed.
    turn = UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    if turn is not None:
        kept = {key: value for key, value in image.info.items() if key == "transparency"}
        image = image.transpose(turn)
        image.info.clear()  # nobody who reads the metadata turns it again
        image.info.update(kept)
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.uint16), 65535, image.info.get("transparency"))
    if image.mode == "I":
        return _grey(np.asarray(image), 65535, None)
    if image.mode == "F":
        return _grey(np.asarray(image), 1, None)
    if image.mode == "LAB":
        raise PictureError("is a LAB picture; save it as RGB")
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        return opaque.convert("RGB")
    return image


def _grey(pixels: np.ndarray, white: int, transparent: int | None) -> Image.Image:
    """Pixels (H, W) from 0 (black) to `white` as 8 bits; those of the value `transparent` become white."""
    low, high = pixels.min(), pixels.max()
    if not (low >= 0 and high <= white):  # also where one is no number
        raise PictureError(f"has pixels from {low:g} to {high:g}; its kind goes from 0 (black) to {white} (white)")
    grey = np.empty(pixels.shape, np.uint8)
    for above, below in zip(pixels, grey, strict=True):  # row by row: a copy in float64 takes eight times the picture
        below[:] = np.rint(above * (255 / white))
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey)


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
    max_megapixels: int = pydantic.Field(default=MAX_MEGAPIXELS, ge=1, le=PILLOW_LIMIT // MEGAPIXEL)
    """A document with a picture of more millions of pixels is skipped, counted and named; the picture is not decoded,
    since a small file can hold gigabytes."""

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
        """The square of a picture in any of `FORMATS`; raises what `open_picture` raises."""
        return self.square(
            open_picture(content, self.max_megapixels * MEGAPIXEL, f"modalities.{self.part}.max_megapixels")
        )

    def square(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The image as the modality sees it, (image_size, image_size, channels) uint8: the middle square of `plain`.

        An image whose short side is image_size already is not resampled.

        Args:
            image: a Pillow image, or (H, W), (H, W, 1) or (H, W, 3) uint8.
        """
        if isinstance(image, np.ndarray):
            if image.dtype == np.uint8 and image.shape == (self.image_size, self.image_size, self.channels):
                return image
            image = _from_array(image)
        image = plain(image).convert("L" if self.channels == 1 else "RGB")
        image = _resized(image, self.image_size)
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


def _resized(image: Image.Image, side: int) -> Image.Image:
    """The picture with a short side of `side`, or the middle square of it where it is a long strip."""
    short, long = sorted(image.size)
    if short == side:
        return image
    width, height = (max(side, round(each * side / short)) for each in image.size)
    if max(width, height) <= STRIP * side:
        return image.resize((width, height), Image.Resampling.BICUBIC)
    length = max(width, height)
    first = (length - side) // 2
    start, stop = first * long / length, min((first + side) * long / length, long)
    box = (start, 0, stop, short) if width > height else (0, start, short, stop)
    return image.resize((side, side), Image.Resampling.BICUBIC, box)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image; "
            "it needs (H, W), (H, W, 1) or (H, W, 3) and uint8"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)
