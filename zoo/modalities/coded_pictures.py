"""What image tokenizers share that make a code of every square of a picture: sizes, shapes, and the ids of an item.

A picture is brought to one of several sizes, that whose shape is nearest its own. Where there are several, the first
position of an item says which: its ids are those after the codes.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import pydantic
from PIL import Image, ImageOps

from zoo.carries import Ids
from zoo.modalities.pictures import MAX_MEGAPIXELS, MEGAPIXEL, PILLOW_LIMIT, open_picture, plain
from zoo.modality import Following, Modality, ModalityConfig, Positions

Size = Annotated[tuple[pydantic.PositiveInt, pydantic.PositiveInt], pydantic.Field(strict=False)]
"""Height and width in pixels; YAML has lists where Python has tuples."""


class CodedConfig(ModalityConfig):
    """Colour pictures of one or several sizes, each square of them a code."""

    part: ClassVar[str] = "image"
    suffix: ClassVar[str] = ".png"
    shorten: ClassVar[str] = "take smaller sizes"
    path: str
    """The file or folder that holds the tokenizer."""
    sizes: list[Size] = pydantic.Field(min_length=1)
    """Heights and widths in pixels, as [[32, 32], [24, 40], [40, 24]]; a picture takes that of the nearest shape."""
    aspect: Literal["crop", "pad", "stretch"] = "crop"
    """How a picture of another shape becomes one of its size: what protrudes is cut off on both sides; or it is
    fitted in whole on white; or it is stretched."""
    patch: pydantic.PositiveInt
    """Side in pixels of the square that a code stands for; divides all heights and widths."""
    codes: int = pydantic.Field(ge=2)
    """Codes of the tokenizer; each size beyond a single one needs an id besides."""
    max_megapixels: int = pydantic.Field(default=MAX_MEGAPIXELS, ge=1, le=PILLOW_LIMIT // MEGAPIXEL)
    """A document with a picture of more millions of pixels is skipped, counted and named; it is not decoded."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> CodedConfig:
        for size in self.sizes:
            if any(side % self.patch for side in size):
                raise ValueError(f"sizes: {list(size)}: patch = {self.patch} does not divide both sides")
        if len(set(self.sizes)) < len(self.sizes):
            raise ValueError("sizes: name one twice; each stands once")
        return self

    @property
    def marked(self) -> bool:
        """The first position of an item says its size."""
        return len(self.sizes) > 1

    @property
    def carries(self) -> Ids:
        return Ids(self.codes + (len(self.sizes) if self.marked else 0))

    @property
    def positions(self) -> Positions:
        counts = [self.marked + math.prod(self.grid(size)) for size in self.sizes]
        return Positions(min(counts), max(counts))

    def following(self, before: Sequence[int]) -> Following:
        """First the size where there are several, then as many codes as that takes."""
        if self.marked and not len(before):
            return Following((self.codes, self.codes + len(self.sizes)), end=False)
        size = self.sizes[int(before[0]) - self.codes] if self.marked else self.sizes[0]
        done = len(before) >= self.marked + math.prod(self.grid(size))
        return Following(None if done else (0, self.codes), done)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the codes of a size."""
        return size[0] // self.patch, size[1] // self.patch

    def read(self, content: bytes) -> np.ndarray:
        """The picture of a file, (height, width, 3) uint8 in one of `sizes`; raises what `open_picture` raises."""
        return self.fitted(open_picture(content, self.max_megapixels * MEGAPIXEL, "max_megapixels of its modality"))

    def fitted(self, image: Image.Image) -> np.ndarray:
        """A picture as the modality sees it, (height, width, 3) uint8 in that of `sizes` whose shape is nearest."""
        image = plain(image).convert("RGB")
        shape = math.log(image.height / image.width)
        height, width = min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))
        if self.aspect == "crop":
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        elif self.aspect == "pad":
            image = ImageOps.pad(image, (width, height), Image.Resampling.BICUBIC, color="white")
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image, dtype=np.uint8)


class CodedPictures(Modality):
    """What these tokenizers share; an item is a picture (height, width, 3) uint8 in one of `sizes`."""

    config: CodedConfig

    def __init__(self, config: CodedConfig, content: str) -> None:
        """Args: `content` is a hash of what the tokenizer is made of."""
        super().__init__(config)
        said = [config.model_dump(mode="json", exclude={"path", "max_megapixels"}), content]
        self._fingerprint = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @abc.abstractmethod
    def codes(self, picture: np.ndarray) -> np.ndarray:
        """(rows, columns) codes of a picture (height, width, 3) float32 from −1 (black) to 1 (white)."""

    @abc.abstractmethod
    def picture(self, codes: np.ndarray) -> np.ndarray:
        """The picture (height, width, 3) of codes (rows, columns), as `codes` takes it."""

    def encode(self, item: np.ndarray) -> np.ndarray:
        """(n,) int32 ids of a picture; the size first, where there are several, then the codes in raster order."""
        size = tuple(item.shape[:2])
        if item.dtype != np.uint8 or item.shape[2:] != (3,) or size not in self.config.sizes:
            raise ValueError(
                f"an array of shape {item.shape} and type {item.dtype} is no picture in one of {self.config.sizes}"
            )
        ids = self.codes(item.astype(np.float32) / np.float32(127.5) - np.float32(1)).ravel().astype(np.int32)
        if not self.config.marked:
            return ids
        mark = self.config.codes + self.config.sizes.index(size)
        return np.concatenate([[mark], ids]).astype(np.int32)

    def decode(self, content: Iterable[int]) -> np.ndarray:
        """(height, width, 3) uint8 of ids.

        Raises:
            ValueError: ids that no picture has.
            UserError: the tokenizer only encodes.
        """
        ids, config = np.asarray(content), self.config
        mark, codes = (int(ids[0]) - config.codes, ids[1:]) if config.marked and len(ids) else (0, ids)
        sizes = config.sizes[mark : mark + 1] if mark >= 0 else []
        if not sizes or codes.shape != (math.prod(config.grid(sizes[0])),) or not _all_below(codes, config.codes):
            raise ValueError(f"these are no ids of a picture in one of {config.sizes}: {ids.tolist()}")
        pixels = self.picture(codes.reshape(config.grid(sizes[0])))
        return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)

    def write(self, item: np.ndarray) -> bytes:
        """A PNG file."""
        content = io.BytesIO()
        Image.fromarray(item).save(content, "PNG")
        return content.getvalue()


def _all_below(codes: np.ndarray, limit: int) -> bool:
    return bool(((codes >= 0) & (codes < limit)).all())
