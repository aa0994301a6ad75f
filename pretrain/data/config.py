"""The `data` section of a recipe."""

from __future__ import annotations

import pydantic

from zoo.config import Config, ConfigError
from zoo.modalities import Modalities


class DataConfig(Config):
    """Where the shards are and how they become rows of tokens."""

    path: str
    """Folder of WebDataset tar shards, relative to the current working directory."""
    train: str = "*train*.tar"
    """Pattern of the training shards' names inside `path`."""
    validation: str | None = "*val*.tar"
    """Pattern of the validation shards' names; null for none."""
    sequence_length: pydantic.PositiveInt
    """T, tokens of a row; a whole item with its markers, such as an image, must fit."""
    max_broken_documents: pydantic.NonNegativeInt = 0
    """How many unusable documents may be skipped, over all shards. Each is named."""
    cache: str | None = None
    """Folder for indexes and what modalities learn; default: a hidden folder inside `path`, or, where that cannot be
    written, one under the user's cache folder."""


def check_length(config: DataConfig, modalities: Modalities) -> None:
    """Raise `ConfigError` where a whole item of a modality, with its markers, does not fit into a row."""
    need, what, way_out = 2, "<bos> and <eos>", ""
    for name, modality in modalities.items():
        if modality.positions is not None and modality.positions.most + 4 > need:
            most = modality.positions.most
            need = most + 4
            what = f"one {name}: {most} positions, <begin_{name}>, <end_{name}>, <bos> and <eos>"
            way_out = f", or in modalities.{name} {modality.shorten}" if modality.shorten else ""
    if config.sequence_length < need:
        raise ConfigError(
            f"data.sequence_length: {config.sequence_length}: is too short for {what} need {need} tokens; set "
            f"data.sequence_length to at least {need}{way_out}"
        )
