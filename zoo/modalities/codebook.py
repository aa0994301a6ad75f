"""A codebook: vectors of 8-bit numbers ↔ ids, by k-means.

Vectors and codes are 8-bit integers and distances are computed exactly, so the ids of a vector do not depend on the
machine, the number of threads or the company it is encoded in.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from zoo.config import UserError

VECTORS_PER_CODE = 256  # for k-means; more vectors hardly move the codes
SMALL_FIT = 20_000  # vectors up to which Lloyd's algorithm is run on all of them


class Nearest:
    """The number of the nearest code.

    Args:
        codes: (codes, dimension) uint8.
    """

    def __init__(self, codes: np.ndarray) -> None:
        # |x - c|² = |x|² - 2 (x·c - |c|²/2). Multiples of ½ below 2^52 are exact in float64, whatever the BLAS.
        self._codes = np.ascontiguousarray(codes.astype(np.float64).T)
        self._half_square = (self._codes**2).sum(axis=0) / 2

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """(n,) int32 ids of (n, dimension) uint8 vectors; ties: the lower id."""
        scores = vectors.astype(np.float64) @ self._codes - self._half_square
        return scores.argmax(axis=1).astype(np.int32)


def fit_codes(vectors: np.ndarray, codes: int) -> np.ndarray:
    """(codes, dimension) uint8 codes of (n, dimension) uint8 vectors by k-means, a function of its arguments alone."""
    # Slow to import, and only ever needed once per codebook.
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    random = np.random.RandomState(0)
    if len(vectors) > codes * VECTORS_PER_CODE:
        vectors = vectors[np.sort(random.choice(len(vectors), codes * VECTORS_PER_CODE, replace=False))]
    distinct = np.unique(vectors, axis=0)
    if len(distinct) <= codes:  # every vector is its own code; the spare ids repeat the last and are never chosen
        return distinct[np.minimum(np.arange(codes), len(distinct) - 1)]
    if len(vectors) <= SMALL_FIT:
        kmeans = KMeans(codes, n_init=2, max_iter=100, random_state=0)
    else:
        kmeans = MiniBatchKMeans(codes, n_init=1, batch_size=4096, max_iter=20, random_state=0)
    with threadpool_limits(1):  # the order of summation, and so the result, would depend on the number of threads
        kmeans.fit(vectors.astype(np.float32))
    return np.clip(np.rint(kmeans.cluster_centers_), 0, 255).astype(np.uint8)


def check_codes(codes: np.ndarray, shape: tuple[int, int]) -> None:
    """Raise `ValueError` where codes are not (codes, dimension) uint8 as a config wants them."""
    if codes.shape != shape or codes.dtype != np.uint8:
        raise ValueError(
            f"a codebook of shape {codes.shape} and type {codes.dtype} does not fit the config; it needs {shape} and "
            "uint8"
        )


def save_codes(path: str | Path, codes: np.ndarray, made_for: Mapping[str, str]) -> None:
    """Write a codebook and what it is made for, by key, as safetensors."""
    Path(path).write_bytes(safetensors.numpy.save({"codebook": codes}, metadata=dict(made_for)))


def load_codes(path: str | Path, made_for: Mapping[str, str], what: str) -> np.ndarray:
    """Read a codebook.

    Args:
        made_for: what it must be made for, by key.
        what: "image", for messages.
    Raises:
        UserError: the file is missing, is not a codebook, or was made for something else.
    """
    if not Path(path).is_file():
        raise UserError(f"{what} codebook {path} does not exist; correct `path`, or set it to null to train one")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            codes, found = file.get_tensor("codebook"), file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not {'an' if what[0] in 'aeio' else 'a'} {what} codebook: {error}") from None
    for key, value in made_for.items():
        if found.get(key) != value:
            raise UserError(f"{path} was made with {key} {found.get(key)}, the config says {value}; make them equal")
    return codes
