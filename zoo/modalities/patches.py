"""Image ↔ ids: a k-means codebook of square patches, in raster order.

Pixels and codes are 8-bit integers and distances are computed exactly, so the ids of an image do not depend on the
machine, the number of threads or the company an image is encoded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic
import safetensors
import safetensors.numpy
from PIL import Image

from zoo.carries import Ids
from zoo.config import UserError
from zoo.modalities.pictures import Picture, PictureConfig
from zoo.modality import LearnedConfig, LearnedModality
from zoo.registry import register

PATCHES_PER_CODE = 256  # for k-means; more patches hardly move the codes
SMALL_FIT = 20_000  # patches up to which Lloyd's algorithm is run on all of them


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
            return Patches(self, _codebook(np.concatenate(patches), self.codes))

        def load(self, path: str | Path) -> Patches:
            """Read a codebook.

            Raises:
                UserError: the file is missing, is not a codebook, or was made for another geometry.
            """
            if not Path(path).is_file():
                raise UserError(f"image codebook {path} does not exist; correct `path`, or set it to null to train one")
            try:
                with safetensors.safe_open(str(path), framework="numpy") as file:
                    codebook, made_for = file.get_tensor("codebook"), file.metadata() or {}
            except safetensors.SafetensorError as error:
                raise UserError(f"{path} is not an image codebook: {error}") from None
            for key, value in self.geometry().items():
                if made_for.get(key) != value:
                    raise UserError(
                        f"{path} was made with {key} {made_for.get(key)}, the config says {value}; make them equal"
                    )
            return Patches(self, codebook)

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
        if codebook.shape != (config.codes, config.dimension) or codebook.dtype != np.uint8:
            raise ValueError(
                f"a codebook of shape {codebook.shape} and type {codebook.dtype} does not fit the config; "
                f"it needs {(config.codes, config.dimension)} and uint8"
            )
        super().__init__(config)
        self.codebook = codebook
        content = str(sorted(config.geometry().items())).encode() + codebook.tobytes()
        self._fingerprint = hashlib.sha256(content).hexdigest()
        # |x - c|² = |x|² - 2 (x·c - |c|²/2). Multiples of ½ below 2^52 are exact in float64, whatever the
        # BLAS.
        self._codes = np.ascontiguousarray(codebook.astype(np.float64).T)
        self._half_square = (self._codes**2).sum(axis=0) / 2

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, item: Image.Image | np.ndarray) -> np.ndarray:
        """(positions,) int32 ids of a Pillow image or an (H, W[, channels]) uint8 array; ties: the lower id."""
        scores = self.config.patches(item).astype(np.float64) @ self._codes - self._half_square
        return scores.argmax(axis=1).astype(np.int32)

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
        content = safetensors.numpy.save({"codebook": self.codebook}, metadata=self.config.geometry())
        Path(path).write_bytes(content)


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
