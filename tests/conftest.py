"""What tests of several folders share: the digits as shards, indexed once."""

from __future__ import annotations

from pathlib import Path

import pytest


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
