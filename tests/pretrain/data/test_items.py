"""What positions carry that carry no ids, from shards to batches; and which positions see all of their item."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import zoo
from pretrain.data import Data, DataConfig, micro_batches, open_data
from pretrain.data.items import Items
from tests.pretrain.data.samples import TEXT, png, sample, write_shard
from zoo.modalities import Channels, Modality, ModalityConfig, Positions, parse_modalities

PICTURES = {"type": "continuous_patches", "image_size": 8, "patch": 4, "channels": 1}
LENGTH = 40


@pytest.fixture(scope="module", autouse=True)
def tones() -> None:
    @zoo.register("modality", "tones")
    class Tones(Modality):
        """Frames of two channels, eight ids each."""

        class Config(ModalityConfig):
            part: ClassVar[str] = "audio"
            suffix: ClassVar[str] = ".json"

            @property
            def carries(self) -> Channels:
                return Channels(2, 8)

            @property
            def positions(self) -> Positions:
                return Positions(1, 9)

            def read(self, content: bytes) -> list[list[int]]:
                return json.loads(content)

        def encode(self, item: list[list[int]]) -> np.ndarray:
            return np.array(item)

        def decode(self, content: np.ndarray) -> list[list[int]]:
            return content.tolist()

        def write(self, item: list[list[int]]) -> bytes:
            return json.dumps(item).encode()


def frames(number: int) -> list[list[int]]:
    return [[(number + k) % 8, k % 8] for k in range(1 + number % 5)]


def heard(key: str, number: int, *parts: str | bytes) -> dict[str, bytes]:
    """A document that begins with tones."""
    document = sample(key, *parts)
    listed = json.loads(document["json"])["parts"]
    document["json"] = json.dumps({"parts": [{"type": "audio", "file": "wav"}, *listed]}).encode()
    return document | {"wav": json.dumps(frames(number)).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard in range(3):  # of which the second has neither
        documents = [
            sample(f"{n}", "words")
            if shard == 1
            else heard(f"{n}", 10 * shard + n, png(10 * shard + n), "text", png(99))
            for n in range(6)
        ]
        write_shard(tmp_path / f"train-{shard}.tar", documents)
    return tmp_path


def opened(folder: Path, seed: int = 0, **image: str) -> Data:
    modalities = parse_modalities({"text": TEXT, "image": PICTURES | image, "speech": {"type": "tones"}})
    config = DataConfig(path=str(folder), train="train*.tar", validation=None, sequence_length=LENGTH)
    return open_data(config, modalities, seed, log=lambda line: None)


def test_vectors_and_channels_of_every_row(folder: Path) -> None:
    data = opened(folder)
    pixels = {tuple(np.random.RandomState(n).randint(0, 256, (8, 8))[0, :3].tolist()): n for n in (*range(26), 99)}
    seen = []
    for number in range(data.train.rows_per_epoch):
        row = data.train.row(number)
        assert row.content["image"].dtype == np.float32 and row.content["image"].shape[1] == 16
        assert row.content["speech"].dtype == np.uint8 and row.content["speech"].shape[1] == 2
        for m, name in enumerate(data.vocabulary.modalities):
            if m:
                assert len(row.content[name]) == int((row.modality == m).sum())
        images = row.content["image"].reshape(-1, 4, 16)
        shown = [pixels[tuple(data.modalities["image"].decode(image)[0, :3, 0].tolist())] for image in images]
        seen += shown
        frame = 0
        for which in shown[::2]:  # every document has its own picture and number 99
            expected = np.array(frames(which))
            assert np.array_equal(row.content["speech"][frame : frame + len(expected)], expected)
            frame += len(expected)
    assert sorted(seen) == sorted([*range(6), *range(20, 26), *[99] * 12])


def test_batches_hold_tensors_that_fit_the_context(folder: Path) -> None:
    data = opened(folder)
    for batch in micro_batches(data.train, range(6), 2):
        assert batch.content["image"].dtype == torch.float32 and batch.content["speech"].dtype == torch.int64
        for m, name in ((1, "image"), (2, "speech")):
            assert len(batch.content[name]) == len(batch.context.index(m)) == batch.context.totals[m]
        assert batch.context.item is None, "masks are causal"
    (padding,) = micro_batches(data.train, range(1), 1, end=0)
    assert padding.content["image"].shape == (0, 16) and padding.content["speech"].shape == (0, 2)


def test_a_bidirectional_modality_gives_items(folder: Path) -> None:
    """Each picture is an item: its positions, not its markers; the same rows besides."""
    plain, data = opened(folder), opened(folder, mask="bidirectional")
    for number in range(data.train.rows_per_epoch):
        row = data.train.row(number)
        inside = row.modality == data.vocabulary.modalities.index("image")
        assert np.array_equal(row.item >= 0, inside)
        items = row.item[inside].reshape(-1, 4)
        assert np.array_equal(items, np.arange(len(items))[:, None].repeat(4, 1))
        assert np.array_equal(row.tokens, plain.train.row(number).tokens)
    (batch,) = micro_batches(data.train, range(2), 2)
    assert batch.context.item is not None
    image = batch.context.modality == 1
    mask = batch.context.mask[:, 0]
    row, column = image.nonzero()[0].tolist()
    assert bool(mask[row, column, column : column + 4].all()) and not bool(mask[row, column, column + 4])


def test_a_damaged_or_missing_file_is_made_again(folder: Path) -> None:
    first = opened(folder).train.row(0).content
    files = sorted((folder / ".index").rglob("*.content"))
    assert len(files) == 6
    files[0].unlink()
    files[-1].write_bytes(files[-1].read_bytes()[:-2])  # whole rows are missing
    second = opened(folder).train.row(0).content
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_encode_gives_must_be_what_the_config_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zoo.modalities import ContinuousPatches

    monkeypatch.setattr(ContinuousPatches, "encode", lambda self, item: np.zeros((4, 7)))
    with pytest.raises(ValueError, match=r"image: encode gave an array of shape \(4, 7\); its positions carry \(16,\)"):
        opened(folder)


def test_items_of_a_stretch() -> None:
    items = Items(np.array([[1, 6, 12], [4, 7, 14], [0, 3, 4]]))
    assert items.inside(0, 8)[:2].T.tolist() == [[1, 4], [6, 7]] and items.inside(8, 20)[:2].T.tolist() == [[12, 14]]
    assert items.positions(0, 5) == slice(0, 3) and items.positions(5, 8) == slice(3, 4)
    assert items.positions(8, 20) == slice(4, 6) and items.positions(14, 20) == items.positions(0, 1) == slice(0, 0)
