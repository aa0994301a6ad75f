"""Vocabulary, text and image tokenizers: partition, round trips, determinism, errors."""

import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from zoo.config import ConfigError, UserError
from zoo.modalities import BPEConfig, BytesConfig, PatchesConfig, PatchTokenizer, Vocabulary

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "Ünïcödé 汉字 🙂\n\ttabs  and   spaces",
    "",
    "\x00\xff <bos> <eos>",
]


def random_image(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, channels)).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ vocabulary


@pytest.mark.parametrize("sizes", [{"text": 5}, {"text": 5, "image": 3}, {"image": 3, "text": 5, "speech": 2}])
def test_vocabulary_is_a_partition(sizes):
    vocabulary = Vocabulary(sizes)
    ids = list(vocabulary.specials.values())
    for modality, size in sizes.items():
        start, stop = vocabulary.range(modality)
        assert stop - start == size
        ids += range(start, stop)
    assert sorted(ids) == list(range(vocabulary.size))
    assert len(vocabulary.specials) == 2 * len(sizes)  # bos and eos, and a pair for each modality but text
    assert vocabulary.modalities == tuple(sizes)


def test_modality_of_every_token():
    vocabulary = Vocabulary({"text": 5, "image": 3, "speech": 2})
    modality = vocabulary.modality_of(np.arange(vocabulary.size).reshape(2, 8))
    assert modality.dtype == np.int8
    assert modality.reshape(-1).tolist() == [0] * 6 + [0] * 5 + [1] * 3 + [2] * 2
    assert [vocabulary.name(t) for t in (0, 1, vocabulary.begin("image"), vocabulary.end("speech"), 6, 11, 15)] == [
        "<bos>",
        "<eos>",
        "<begin_image>",
        "<end_speech>",
        "text 0",
        "image 0",
        "speech 1",
    ]


def test_vocabulary_refuses_what_it_cannot_hold():
    with pytest.raises(ValueError, match="lacks 'text'"):
        Vocabulary({"image": 4})
    with pytest.raises(ValueError, match="'image' has 0 ids"):
        Vocabulary({"text": 4, "image": 0})
    for token in (-1, 10):
        with pytest.raises(ValueError, match=r"the vocabulary has \[0, 5\]"):
            Vocabulary({"text": 4}).modality_of(np.array([0, token]))


# ------------------------------------------------------------------------------------------------------------ text


def test_text_round_trips():
    for tokenizer in (BytesConfig().fit([]), BPEConfig(vocab_size=300).fit(TEXTS)):
        for text in [*TEXTS, "never seen: żółw"]:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert all(0 <= i < tokenizer.size for i in ids)


def test_bpe_shortens_frequent_text_and_keeps_its_size():
    config = BPEConfig(vocab_size=1000)
    tokenizer = config.fit(["seven " * 50])
    assert len(tokenizer.encode("seven seven")) <= 3
    assert tokenizer.size == config.size == 1000  # although training found fewer


def test_bpe_is_a_function_of_its_texts_in_every_process():
    command = (
        "from zoo.modalities import BPEConfig; import random; r = random.Random(0);"
        "print(BPEConfig(vocab_size=400).fit([''.join(r.choices('abcdef ', k=99)) for _ in range(99)]).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    r = random.Random(0)
    here = BPEConfig(vocab_size=400).fit(["".join(r.choices("abcdef ", k=99)) for _ in range(99)])
    assert other.stdout.strip() == here.fingerprint


def test_bpe_saves_and_loads(tmp_path):
    config = BPEConfig(vocab_size=300)
    tokenizer = config.fit(TEXTS)
    tokenizer.save(tmp_path / "text.json")
    loaded = config.load(tmp_path / "text.json")
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert loaded.fingerprint == tokenizer.fingerprint
    assert BPEConfig(vocab_size=301).load(tmp_path / "text.json").fingerprint != tokenizer.fingerprint
    with pytest.raises(UserError, match=r"uses ids up to 2\d\d, but vocab_size is 256; set vocab_size to"):
        BPEConfig(vocab_size=256).load(tmp_path / "text.json")
    with pytest.raises(UserError, match="nowhere.json does not exist"):
        config.load(tmp_path / "nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="broken.json is no tokenizer.json"):
        config.load(tmp_path / "broken.json")


# ----------------------------------------------------------------------------------------------------------- image


def test_patches_are_in_raster_order_and_come_back():
    config = PatchesConfig(image_size=4, patch=2, channels=1, codes=4)
    image = np.arange(16, dtype=np.uint8).reshape(4, 4)
    patches = config.patches(image)
    assert patches.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert np.array_equal(config.unpatch(patches)[:, :, 0], image)
    colour = PatchesConfig(image_size=8, patch=4, codes=4)
    assert np.array_equal(colour.unpatch(colour.patches(random_image(0, 8, 8))), random_image(0, 8, 8))


def test_square_crops_the_centre_and_leaves_the_right_size_alone():
    config = PatchesConfig(image_size=8, patch=2, codes=4)
    wide = random_image(0, 8, 13)
    assert np.array_equal(config.square(wide), wide[:, 2:10])
    assert np.array_equal(config.square(wide.transpose(1, 0, 2)), wide.transpose(1, 0, 2)[2:10])
    assert config.square(random_image(0, 50, 31)).shape == (8, 8, 3)
    assert config.square(random_image(0, 3, 200)).shape == (8, 8, 3)
    grey = PatchesConfig(image_size=8, patch=2, codes=4, channels=1)
    assert np.array_equal(grey.square(wide[:, :8, :1]), wide[:, :8, :1])
    assert grey.square(Image.fromarray(wide).convert("P")).shape == (8, 8, 1)


def test_encode_is_the_nearest_code():
    config = PatchesConfig(image_size=8, patch=2, codes=7)
    tokenizer = config.fit([random_image(seed, 8, 8) for seed in range(9)])
    image = random_image(99, 8, 8)
    ids = tokenizer.encode(image)
    distance = ((config.patches(image)[:, None].astype(int) - tokenizer.codebook[None].astype(int)) ** 2).sum(-1)
    assert np.array_equal(ids, distance.argmin(1))
    assert ids.shape == (config.tokens_per_image,)
    assert np.array_equal(tokenizer.encode(Image.fromarray(image)), ids)
    assert np.array_equal(config.patches(tokenizer.decode(ids)), tokenizer.codebook[ids])


def test_ties_go_to_the_lower_code():
    config = PatchesConfig(image_size=1, patch=1, channels=1, codes=3)
    tokenizer = PatchTokenizer(config, np.array([[10], [20], [10]], np.uint8))
    assert [tokenizer.encode(np.full((1, 1), v, np.uint8))[0] for v in (10, 15, 16)] == [0, 0, 1]


def test_few_distinct_patches_are_kept_exactly():
    config = PatchesConfig(image_size=4, patch=2, channels=1, codes=16)
    images = [np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((2, 2), np.uint8)), np.zeros((4, 4), np.uint8)]
    tokenizer = config.fit(images)
    for image in images:
        assert np.array_equal(tokenizer.decode(tokenizer.encode(image))[:, :, 0], image)


@pytest.mark.parametrize("images", [20, 400])  # Lloyd, mini-batches
def test_codebook_is_deterministic(images):
    config = PatchesConfig(image_size=16, patch=2, codes=40)
    first, second = (config.fit([random_image(seed, 16, 16) for seed in range(images)]) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    other = config.fit([random_image(seed, 16, 16) for seed in range(1, images)])
    assert other.fingerprint != first.fingerprint


def test_codebook_saves_and_loads(tmp_path):
    config = PatchesConfig(image_size=8, patch=2, codes=4)
    tokenizer = config.fit([random_image(0, 8, 8)])
    tokenizer.save(tmp_path / "image.safetensors")
    assert config.load(tmp_path / "image.safetensors").fingerprint == tokenizer.fingerprint
    with pytest.raises(UserError, match="was made with image_size 8, the config says 16"):
        PatchesConfig(image_size=16, patch=2, codes=4).load(tmp_path / "image.safetensors")
    with pytest.raises(UserError, match="nowhere does not exist"):
        config.load(tmp_path / "nowhere")
    (tmp_path / "broken").write_bytes(b"123")
    with pytest.raises(UserError, match="broken is no image codebook"):
        config.load(tmp_path / "broken")


def test_image_errors_name_key_and_rule():
    with pytest.raises(ConfigError, match=r"^data.image.patch: 5: does not divide image_size = 32; choose a divisor"):
        PatchesConfig.parse({"patch": 5}, "data.image")
    with pytest.raises(UserError, match="no image to learn"):
        PatchesConfig().fit([])
    tokenizer = PatchesConfig(image_size=2, patch=2, codes=2).fit([random_image(0, 2, 2)])
    with pytest.raises(ValueError, match=r"an image has 1 ids in \[0, 1\]; got \[2\]"):
        tokenizer.decode([2])
    with pytest.raises(ValueError, match="is no image"):
        tokenizer.encode(np.zeros((2, 2)))
