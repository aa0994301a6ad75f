"""Data folders for the tests of the data path: the digits, and a small one."""

from pathlib import Path

import pytest

from pretrain.data import DataConfig
from tests.pretrain.data.samples import png, sample, write_shard
from tools.examples.make_digits import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a training shard of ten documents and a validation shard of two."""
    data = tmp_path / "data"
    data.mkdir()
    write_shard(data / "a-train-0.tar", [sample(f"{n:03d}", f"text {n}", png(n), "after") for n in range(10)])
    write_shard(data / "a-val-0.tar", [sample(f"{n:03d}", png(n), f"text {n}") for n in range(10, 12)])
    return data


@pytest.fixture
def config(folder: Path) -> DataConfig:
    return DataConfig.parse({"path": str(folder), "sequence_length": 32}, "data")


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits without shifted copies: 3,000 training and 594 validation documents."""
    path = tmp_path_factory.mktemp("digits")
    write(path, shifts=0)
    return path
