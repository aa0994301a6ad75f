"""What judges items that a model has made: a classifier fitted on real ones, the distance to the nearest real one, and
distances between distributions of features. Pictures and sounds are seen as rows of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from zoo.modalities.speech import DMel, Spectrum

RESAMPLES = 2000
FRAMES = 12
"""Frames that are seen of any sound, evenly over its length."""
COMPONENTS = 60
"""Principal components of the pixels that the classifier of pictures sees."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of n cases, with an interval that holds 95 % of what chance makes of it."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, hits: np.ndarray) -> Share:
        """The mean of (n,) cases that are 0 or 1, under resampling of the cases."""
        drawn = np.random.default_rng(0).integers(0, len(hits), (RESAMPLES, len(hits)))
        low, high = np.quantile(hits[drawn].mean(1), (0.025, 0.975))
        return cls(float(hits.mean()), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


class Sounds:
    """Sounds at a rate as rows of numbers: `FRAMES` frames of 40 mel bands, whatever their length and loudness."""

    def __init__(self, rate: int) -> None:
        self.spectrum = Spectrum(DMel.Config(rate=rate, mels=40, high=0.95 * rate / 2))

    def rows(self, sounds: Sequence[np.ndarray]) -> np.ndarray:
        """(n, FRAMES · 40) of n sounds."""
        return np.stack([self._seen(sound) for sound in sounds])

    def _seen(self, sound: np.ndarray) -> np.ndarray:
        frames = np.maximum(self.spectrum.frames(sound), -3)
        frames = frames - frames.mean()  # however loud it is
        at = np.linspace(0, len(frames) - 1, FRAMES)
        return np.stack([np.interp(at, np.arange(len(frames)), channel) for channel in frames.T]).ravel()


def picture_rows(pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(n, H · W · channels) of n pictures of one size, uint8."""
    return np.stack([np.asarray(picture).ravel() for picture in pictures])


def picture_classifier(rows: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """A function from (n, d) pixels to their labels: a support vector machine on their principal components, all labels
    weighing alike.

    Args:
        rows: (n, d) uint8 of real pictures.
        labels: (n,) of each.
    """
    pixels = rows / 255
    components = PCA(min(COMPONENTS, *pixels.shape), random_state=0)
    fitted: Any = make_pipeline(components, SVC(C=3.0, class_weight="balanced")).fit(pixels, labels)
    return lambda other: fitted.predict(other / 255)


def sound_classifier(rows: np.ndarray, labels: Sequence[str] | np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The same from rows of `Sounds`."""
    return SVC(C=10.0).fit(rows, labels).predict


def squared_distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m) mean squared differences between rows (n, d) and others (m, d)."""
    a, b = rows.astype(np.float64), others.astype(np.float64)
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.maximum(squared, 0) / a.shape[1]


def distances(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) root mean square difference between each of rows (n, d) and the nearest of others (m, d)."""
    return np.sqrt(squared_distances(rows, others).min(1))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance between normal distributions that are fitted to features (n, d) and (m, d):
    ‖μ − ν‖² + tr(A + B − 2 (A B)^½) (FID, arXiv 1706.08500, where they are an Inception's)."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = (np.atleast_2d(np.cov(each, rowvar=False)) for each in (a, b))
    # tr (A B)^½ by the eigenvalues of A B, which are real and not negative
    values: Any = scipy.linalg.eigvals(first @ second)
    roots = np.sqrt(np.maximum(values.real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first) + np.trace(second) - 2 * roots)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy of features (n, d) and (m, d) under the kernel (x·y / d + 1)³ (KID,
    arXiv 1801.01401); of all pairs, without subsets."""

    def kernel(x: Any, y: Any) -> Any:
        return (x @ y.T / x.shape[1] + 1) ** 3

    a, b = a.astype(np.float64), b.astype(np.float64)
    own = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(sum(own) - 2 * kernel(a, b).mean())
