"""Pictures as vectors: range, a round trip without loss, files, errors."""

import numpy as np
import pytest
from PIL import Image

from tests.zoo.modalities.test_patches import random_image
from zoo.config import ConfigError
from zoo.modalities import ContinuousPatches, Positions, Vectors, parse_modalities, vocabulary

CONFIG = ContinuousPatches.Config(image_size=8, patch=4)


def test_every_pixel_comes_back():
    modality, image = ContinuousPatches(CONFIG), random_image(0, 8, 8)
    vectors = modality.encode(image)
    assert vectors.shape == (4, 48) and vectors.dtype == np.float32 and -1 <= vectors.min() < vectors.max() <= 1
    assert np.array_equal(modality.decode(vectors), image)
    assert np.array_equal(modality.encode(Image.fromarray(image)), vectors)
    assert np.array_equal(CONFIG.read(modality.write(image)), image), "the PNG holds the same picture"
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = ContinuousPatches(ContinuousPatches.Config(image_size=16, patch=2, channels=1))
    assert np.array_equal(grey.decode(grey.encode(every))[:, :, 0], every)


def test_what_a_model_invents_is_clipped():
    vectors = np.full((4, 48), -3.0)
    vectors[1:] = 7.0
    picture = ContinuousPatches(CONFIG).decode(vectors)
    assert (picture[:4, :4] == 0).all() and (picture[4:] == 255).all()


def test_the_config_says_what_there_is_without_data():
    assert (CONFIG.carries, CONFIG.positions, CONFIG.bidirectional) == (Vectors(48), Positions(4, 4), False)
    assert ContinuousPatches.Config(mask="bidirectional").bidirectional
    modalities = parse_modalities({"text": {"type": "bytes"}, "image": {"type": "continuous_patches"}})
    assert vocabulary(modalities).sizes == {"text": 256, "image": 1}, "one id holds the places"
    other = ContinuousPatches(CONFIG.model_copy(update={"patch": 2}))
    assert other.fingerprint != ContinuousPatches(CONFIG).fingerprint == ContinuousPatches(CONFIG).fingerprint


def test_errors():
    with pytest.raises(ValueError, match=r"an image has vectors of shape \(4, 48\); got \(3, 48\)"):
        ContinuousPatches(CONFIG).decode(np.zeros((3, 48)))
    with pytest.raises(ConfigError, match="^modalities.image.mask: 'full': must be 'causal' or 'bidirectional'"):
        ContinuousPatches.Config.parse({"mask": "full"}, "modalities.image")
