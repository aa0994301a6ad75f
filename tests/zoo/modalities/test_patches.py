"""Pictures, patches and their codebook: geometry, nearest codes, determinism, files, errors."""

import numpy as np
import pytest
from PIL import Image

from zoo.config import ConfigError, UserError
from zoo.modalities import Patches


def random_image(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, channels)).astype(np.uint8)


def test_patches_are_in_raster_order_and_come_back():
    config = Patches.Config(image_size=4, patch=2, channels=1, codes=4)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    patches = config.patches(image)
    assert patches.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert np.array_equal(config.unpatch(patches)[:, :, 0], image)
    colour = Patches.Config(image_size=8, patch=4, codes=4)
    assert np.array_equal(colour.unpatch(colour.patches(random_image(0, 8, 8))), random_image(0, 8, 8))


def test_square_crops_the_centre_and_leaves_the_right_size_alone():
    config = Patches.Config(image_size=8, patch=2, codes=4)
    wide = random_image(0, 8, 13)
    assert np.array_equal(config.square(wide), wide[:, 2:10])
    assert np.array_equal(config.square(wide.transpose(1, 0, 2)), wide.transpose(1, 0, 2)[2:10])
    assert config.square(random_image(0, 50, 31)).shape == (8, 8, 3)
    assert config.square(random_image(0, 3, 200)).shape == (8, 8, 3)
    grey = Patches.Config(image_size=8, patch=2, codes=4, channels=1)
    assert np.array_equal(grey.square(wide[:, :8, :1]), wide[:, :8, :1])
    assert grey.square(Image.fromarray(wide).convert("P")).shape == (8, 8, 1)


def test_encode_is_the_nearest_code():
    config = Patches.Config(image_size=8, patch=2, codes=7)
    tokenizer = config.fit([random_image(seed, 8, 8) for seed in range(9)])
    image = random_image(99, 8, 8)
    ids = tokenizer.encode(image)
    distance = ((config.patches(image)[:, None].astype(int) - tokenizer.codebook[None].astype(int)) ** 2).sum(-1)
    assert np.array_equal(ids, distance.argmin(1))
    assert ids.shape == (config.positions.most,)
    assert np.array_equal(tokenizer.encode(Image.fromarray(image)), ids)
    assert np.array_equal(config.patches(tokenizer.decode(ids)), tokenizer.codebook[ids])


def test_ties_go_to_the_lower_code():
    config = Patches.Config(image_size=1, patch=1, channels=1, codes=3)
    tokenizer = Patches(config, np.array([[10], [20], [10]], np.uint8))
    assert [tokenizer.encode(np.full((1, 1), v, np.uint8))[0] for v in (10, 15, 16)] == [0, 0, 1]


def test_few_distinct_patches_are_kept_exactly():
    config = Patches.Config(image_size=4, patch=2, channels=1, codes=16)
    images = [np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((2, 2), np.uint8)), np.zeros((4, 4), np.uint8)]
    tokenizer = config.fit(images)
    for image in images:
        assert np.array_equal(tokenizer.decode(tokenizer.encode(image))[:, :, 0], image)


@pytest.mark.parametrize("images", [20, 400])  # Lloyd, mini-batches
def test_codebook_is_deterministic(images):
    config = Patches.Config(image_size=16, patch=2, codes=40)
    first, second = (config.fit([random_image(seed, 16, 16) for seed in range(images)]) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    other = config.fit([random_image(seed, 16, 16) for seed in range(1, images)])
    assert other.fingerprint != first.fingerprint


def test_codebook_saves_and_loads(tmp_path):
    config = Patches.Config(image_size=8, patch=2, codes=4)
    tokenizer = config.fit([random_image(0, 8, 8)])
    tokenizer.save(tmp_path / "image.safetensors")
    assert config.load(tmp_path / "image.safetensors").fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="was made with image_size 8, the config says 16"):
        Patches.Config(image_size=16, patch=2, codes=4).load(tmp_path / "image.safetensors")
    with pytest.raises(UserError, match="nowhere does not exist"):
        config.load(tmp_path / "nowhere")
    (tmp_path / "broken").write_bytes(b"123")
    with pytest.raises(UserError, match="broken is not an image codebook"):
        config.load(tmp_path / "broken")


def test_image_errors_name_key_and_rule():
    with pytest.raises(
        ConfigError, match=r"^modalities.image.patch: 5: does not divide image_size = 32; choose a divisor"
    ):
        Patches.Config.parse({"patch": 5}, "modalities.image")
    with pytest.raises(UserError, match="no image to learn"):
        Patches.Config().fit([])
    tokenizer = Patches.Config(image_size=2, patch=2, codes=2).fit([random_image(0, 2, 2)])
    with pytest.raises(ValueError, match=r"an image has 1 ids in \[0, 1\]; got \[2\]"):
        tokenizer.decode([2])
    with pytest.raises(ValueError, match="is not an image"):
        tokenizer.encode(np.zeros((2, 2)))
