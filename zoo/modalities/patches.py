"""Image ↔ ids: a k-means codebook of square patches, in raster order.

Pixels and codes are 8-bit integers and distances are computed exactly, so the ids of an image do not depend
on the machine, the number of threads or the company an image is encoded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import numpy as np
import pydantic
import safetensors
import safetensors.numpy
from PIL import Image, ImageOps

from zoo.config import Config, UserError

PATCHES_PER_CODE = 256  # for k-means; more patches hardly move the codes
SMALL_FIT = 20_000  # patches up to which Lloyd's algorithm is run on all of them


class PatchesConfig(Config):
    """Patches of `patch`² pixels, each replaced with the nearest of `codes` learned ones.

    image_size: side in pixels of the square that every image is brought to (short side resized, centre
        cropped).
    patch: side of a patch; divides image_size.
    codes: ids in the range of this tokenizer.
    channels: 3 (colour) or 1 (grey).
    path: codebook file (safetensors) as `save` writes it; null trains one on the training shards.
    """

    type: Literal["patches"] = "patches"
    image_size: pydantic.PositiveInt = 32
    patch: pydantic.PositiveInt = 4
    codes: int = pydantic.Field(default=512, ge=2)
    channels: Literal[1, 3] = 3
    path: str | None = None

    @pydantic.field_validator("patch")
    @classmethod
    def _divides(cls, patch: int, info: pydantic.ValidationInfo) -> int:
        image_size = info.data.get("image_size", patch)
        if image_size % patch:
            raise ValueError(f"does not divide image_size = {image_size}; choose a divisor of it")
        return patch

    @property
    def size(self) -> int:
        """Ids in the range of this tokenizer."""
        return self.codes

    @property
    def tokens_per_image(self) -> int:
        """Codes of one image, without its begin and end tokens."""
        return (self.image_size // self.patch) ** 2

    @property
    def dimension(self) -> int:
        """Numbers in one patch."""
        return self.patch**2 * self.channels

    def fit(self, images: Iterable[Image.Image | np.ndarray]) -> PatchTokenizer:
        """Learn the codebook. The same images in the same order give the same one."""
        patches = [self.patches(image) for image in images]
        if not patches:
            raise UserError(
                "there is no image to learn an image codebook from; leave the image tokenizer out, or give its `path`"
            )
        return PatchTokenizer(self, _codebook(np.concatenate(patches), self.codes))

    def load(self, path: str | Path) -> PatchTokenizer:
        """Read a codebook.

        Raises:
            UserError: the file is missing, is no codebook, or was made for another geometry.
        """
        if not Path(path).is_file():
            raise UserError(f"image codebook {path} does not exist; correct `path`, or set it to null to train one")
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                codebook, made_for = file.get_tensor("codebook"), file.metadata() or {}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is no image codebook: {error}") from None
        for key, value in self._geometry().items():
            if made_for.get(key) != value:
                raise UserError(
                    f"{path} was made with {key} {made_for.get(key)}, the config says {value}; make them equal"
                )
        return PatchTokenizer(self, codebook)

    def _geometry(self) -> dict[str, str]:
        return {key: str(getattr(self, key)) for key in ("image_size", "patch", "codes", "channels")}

    def square(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The image as the tokenizer sees it: (image_size, image_size, channels) uint8.

        An image whose short side is image_size already is not resampled.
        """
        if isinstance(image, np.ndarray):
            image = _from_array(image)
        image = ImageOps.exif_transpose(image).convert("L" if self.channels == 1 else "RGB")
        short = min(image.size)
        if short != self.image_size:
            width, height = (max(self.image_size, round(side * self.image_size / short)) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = ((side - self.image_size) // 2 for side in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        return np.asarray(image, dtype=np.uint8).reshape(self.image_size, self.image_size, self.channels)

    def patches(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """(tokens_per_image, dimension) uint8: the patches of `image` in raster order."""
        side = self.image_size // self.patch
        grid = self.square(image).reshape(side, self.patch, side, self.patch, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(side * side, self.dimension)

    def unpatch(self, patches: np.ndarray) -> np.ndarray:
        """The inverse of `patches`: (image_size, image_size, channels) uint8."""
        side = self.image_size // self.patch
        grid = patches.reshape(side, side, self.patch, self.patch, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(self.image_size, self.image_size, self.channels)


class PatchTokenizer:
    """Nearest-code ids of the patches of an image.

    Args:
        config: the geometry.
        codebook: (codes, dimension) uint8.
    """

    def __init__(self, config: PatchesConfig, codebook: np.ndarray) -> None:
        if codebook.shape != (config.codes, config.dimension) or codebook.dtype != np.uint8:
            raise ValueError(
                f"a codebook of shape {codebook.shape} and type {codebook.dtype} does not fit the config; "
                f"it needs {(config.codes, config.dimension)} and uint8"
            )
        self.config = config
        self.codebook = codebook
        self.size = config.size
        self.tokens_per_image = config.tokens_per_image
        content = str(sorted(config._geometry().items())).encode() + codebook.tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        # |x - c|² = |x|² - 2 (x·c - |c|²/2). Multiples of ½ below 2^52 are exact in float64, whatever the
        # BLAS.
        self._codes = np.ascontiguousarray(codebook.astype(np.float64).T)
        self._half_square = (self._codes**2).sum(axis=0) / 2

    def encode(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """(tokens_per_image,) int32 ids of a Pillow image or an (H, W[, channels]) uint8 array; ties: the
        lower id."""
        scores = self.config.patches(image).astype(np.float64) @ self._codes - self._half_square
        return scores.argmax(axis=1).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> np.ndarray:
        """(image_size, image_size, channels) uint8 of tokens_per_image ids.

        Raises:
            ValueError: another number of ids, or an id that is no code.
        """
        ids = np.asarray(ids)
        if ids.shape != (self.tokens_per_image,) or ids.min() < 0 or ids.max() >= self.size:
            raise ValueError(f"an image has {self.tokens_per_image} ids in [0, {self.size - 1}]; got {ids.tolist()}")
        return self.config.unpatch(self.codebook[ids])

    def save(self, path: str | Path) -> None:
        """Write the codebook and its geometry as safetensors."""
        content = safetensors.numpy.save({"codebook": self.codebook}, metadata=self.config._geometry())
        Path(path).write_bytes(content)


ImageTokenizer = PatchTokenizer


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is no image; "
            "it needs (H, W), (H, W, 1) or (H, W, 3) and uint8"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _codebook(patches: np.ndarray, codes: int) -> np.ndarray:
    """(codes, dimension) uint8 codes of (n, dimension) uint8 patches by k-means, a function of its arguments
    alone."""
    # Slow to import, and only ever needed once per codebook.
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    random = np.random.RandomState(0)
    if len(patches) > codes * PATCHES_PER_CODE:
        patches = patches[np.sort(random.choice(len(patches), codes * PATCHES_PER_CODE, replace=False))]
    distinct = np.unique(patches, axis=0)
    if len(distinct) <= codes:  # every patch is its own code; the spare ids repeat the last and are never chosen
        return distinct[np.minimum(np.arange(codes), len(distinct) - 1)]
    if len(patches) <= SMALL_FIT:
        kmeans = KMeans(codes, n_init=2, max_iter=100, random_state=0)
    else:
        kmeans = MiniBatchKMeans(codes, n_init=1, batch_size=4096, max_iter=20, random_state=0)
    with threadpool_limits(1):  # the order of summation, and so the result, would depend on the number of threads
        kmeans.fit(patches.astype(np.float32))
    return np.clip(np.rint(kmeans.cluster_centers_), 0, 255).astype(np.uint8)
