"""Distances between distributions, by hand and by another way of computing them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from tools.evaluate.judging import Share, Sounds, distances, frechet, kernel_distance, sound_classifier


def test_frechet_of_normal_distributions() -> None:
    """Against the formula with a matrix root, and against the closed form where covariances commute."""
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (4000, 3)), random.normal(2, 3, (4000, 3))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
    assert frechet(a, b) == pytest.approx(expected) and frechet(a, b) == pytest.approx(3 * (2**2 + 2**2), rel=0.1)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet(a[:, :1], b[:, :1]) == pytest.approx(2**2 + 2**2, rel=0.1)


def test_kernel_distance_is_the_mean_over_pairs() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(0, 1, (7, 2)), random.normal(1, 1, (5, 2))

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (float(x @ y) / 2 + 1) ** 3

    own = np.mean([k(a[i], a[j]) for i in range(7) for j in range(7) if i != j])
    other = np.mean([k(b[i], b[j]) for i in range(5) for j in range(5) if i != j])
    assert kernel_distance(a, b) == pytest.approx(own + other - 2 * np.mean([k(x, y) for x in a for y in b]))
    same = [kernel_distance(*random.normal(0, 1, (2, 50, 2))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 200**0.5, "unbiased"


def test_shares_and_distances_by_hand() -> None:
    share = Share.of(np.array([1.0] * 75 + [0.0] * 25))
    assert share.value == 0.75 and 0.64 < share.low < 0.70 < 0.80 < share.high < 0.86
    assert str(share).startswith("75.0% (6")
    assert distances(np.zeros((1, 4)), np.array([[3.0] * 4, [9.0] * 4])) == pytest.approx([3.0])


def test_sounds_are_told_apart_however_long_and_loud() -> None:
    random, sounds = np.random.default_rng(0), Sounds(8000)

    def tone(hertz: float) -> np.ndarray:
        time = np.arange(int(random.uniform(0.2, 0.6) * 8000)) / 8000
        return (random.uniform(0.1, 0.9) * np.sin(2 * np.pi * hertz * time)).astype(np.float32)

    names = np.array(["low", "high"] * 20)
    rows = sounds.rows([tone(300 if name == "low" else 1500) for name in names])
    classify = sound_classifier(rows[:30], names[:30])
    assert (classify(rows[30:]) == names[30:]).all()
