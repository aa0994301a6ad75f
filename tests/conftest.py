"""What tests of several folders share: their order, and the digits as shards, indexed once."""

from __future__ import annotations

import collections
import gc
import shutil
from pathlib import Path

import pytest

STARTERS = {"run_ranks", "start", "launch"}
"""What modules import that start processes."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that start processes come first, then those with many tests: a worker takes whole modules, one after the
    other, and none shall begin a long one when the others are through."""
    tests = collections.Counter(item.path for item in items)
    module = {item.path: vars(getattr(item, "module", item)).keys() for item in items}
    items.sort(key=lambda item: (not STARTERS & module[item.path], -tests[item.path]))


def pytest_collection_finish() -> None:
    """What has been imported stays, and there is so much of it that each full collection takes most of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def digit_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the digits (no shifted copies), tokenised as `tests.pretrain.runs.tiny_recipe` asks."""
    from pretrain import recipe as recipes
    from pretrain.data import open_data
    from tests.pretrain.runs import tiny_recipe
    from tools.examples.make_digits import write

    folder = tmp_path_factory.mktemp("digit_shards")
    write(folder, shifts=0)
    recipe = recipes.resolve(tiny_recipe(folder, folder))
    open_data(recipe.data, recipe.modalities, seed=0, log=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def trained_run(digit_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step on the digits, in `run`; its data now lie elsewhere than its recipe says, in `moved`."""
    from tests.pretrain.runs import start, tiny_recipe, write_recipe

    folder = tmp_path_factory.mktemp("trained_run")
    shutil.copytree(digit_shards, folder / "data")
    modalities = tiny_recipe("", "")["modalities"] | {"text": {"type": "bpe", "vocab_size": 300}}
    recipe = write_recipe(folder, folder / "data", folder / "run", train={"steps": 1}, modalities=modalities)
    processes = start([recipe], folder / "printed")
    assert processes.wait() == [0], processes.printed()
    (folder / "data").rename(folder / "moved")
    return folder


@pytest.fixture(scope="session")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files named as spoken digits are, 8 takes of each digit: tones in noise, one pitch a digit."""
    import numpy as np

    from tests.zoo.modalities.speech.waves import file, tone

    folder = tmp_path_factory.mktemp("recordings")
    for digit in range(10):
        for take in range(8):
            random = np.random.RandomState(10 * digit + take)
            sound = tone(random.uniform(0.3, 0.5), hertz=150 * 1.3**digit)
            sound += random.normal(0, 0.01, len(sound)).astype(np.float32)
            (folder / f"{digit}_nobody_{take}.wav").write_bytes(file(sound, subtype="PCM_16"))
    return folder


@pytest.fixture(scope="session")
def spoken_shards(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of the recordings, each to be read and to be spoken."""
    from tools.examples.make_spoken_digits import write

    folder = tmp_path_factory.mktemp("spoken_shards")
    write(recordings, folder)
    return folder
