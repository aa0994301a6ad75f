"""The `data` section of a recipe."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Self

import pydantic

from pretrain.data.errors import DataError
from pretrain.data.shards import find_shards
from pretrain.data.sources import DocumentShards, Shard, Source, SourceConfig, SourceSlot
from pretrain.data.sources.files import is_remote
from zoo.config import Config, ConfigError
from zoo.modalities import Modalities
from zoo.registry import BlockConfig

SHORT = "data"
"""Key of the short form of one source, and its name."""


class DataConfig(Config):
    """Where the data are and how they become rows of tokens: one folder of our shards (`path`), or several sources."""

    path: str | list[str] | None = None
    """Folder of WebDataset tar shards, relative to the current working directory: the short form of one source of our
    documents. A list, URLs and braces are allowed as in any source. With `sources`: the folder from which their
    relative paths start."""
    train: str = "*train*.tar"
    """Pattern of the training shards' names inside `path`."""
    validation: float | str | None = "*val*.tar"
    """Pattern of the validation shards' names inside `path`; or the share of the training documents that is held out,
    by hash of their keys; null for none."""
    sources: dict[str, SourceSlot] = pydantic.Field(default_factory=dict)
    """Sources by names of your own, in place of `path`, `train` and `validation`. Rows are drawn from them by
    `weight`."""
    token_ratio: dict[str, pydantic.PositiveFloat] | None = None
    """Tokens of each modality relative to each other, such as {text: 1, image: 1}: the weights of the sources are moved
    until rows hold them so, and the rows of a step are dealt so that each micro-batch, and so each rank, holds them
    about so."""
    sequence_length: pydantic.PositiveInt
    """T, tokens of a row; a whole item with its markers, such as an image, must fit."""
    max_broken_documents: pydantic.NonNegativeInt = 0
    """How many unusable documents may be skipped, over all shards. Each is named."""
    workers: pydantic.PositiveInt | None = None
    """Processes that tokenise, at most; default: one a core. None are started where it is done in seconds."""
    cache: str | None = None
    """Folder for indexes and what modalities learn; default: a hidden folder inside `path`, or, where that cannot be
    written or there is more than one, one under the user's cache folder."""

    @pydantic.field_validator("sources")
    @classmethod
    def _named(cls, sources: dict[str, SourceConfig]) -> dict[str, SourceConfig]:
        for name in sources:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
                raise ValueError(f"{name!r} must be letters, digits, '_' and '-'")
        return sources

    @pydantic.model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.path is None and not self.sources:
            raise ValueError("has neither path nor sources")
        if self.sources and not isinstance(self.path, str | None):
            raise ValueError("path must be one folder where there are sources")
        return self

    @property
    def entries(self) -> dict[str, Entry]:
        """The sources by name; the short form is one called "data"."""
        if self.sources:
            return {
                name: Entry.of(source, f"data.sources.{name}", str(self.path or ""))
                for name, source in self.sources.items()
            }
        assert self.path is not None
        config = DocumentShards.Config(path=self.path, files=self.train, validation=self.validation)
        return {SHORT: Entry.of(config, SHORT)}

    @property
    def folder(self) -> Path | None:
        """The one folder on this machine in which the data lie, if there is one."""
        path = self.path
        if path is None and len(self.sources) == 1:
            path = next(iter(self.entries.values())).config.path
        return Path(path) if isinstance(path, str) and not is_remote(path) and Path(path).is_dir() else None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A source of the mixture."""

    config: SourceConfig
    key: str
    """Where it stands in the recipe."""

    @classmethod
    def of(cls, config: BlockConfig, key: str, folder: str = "") -> Entry:
        """The entry of a source's config, whose relative paths start from `folder`."""
        assert isinstance(config, SourceConfig)
        paths = [config.path] if isinstance(config.path, str) else config.path
        paths = [path if is_remote(path) else str(Path(folder, path)) for path in paths]
        return cls(config.model_copy(update={"path": paths[0] if isinstance(config.path, str) else paths}), key)

    @property
    def held_out(self) -> float:
        """Share of the documents that is held out by hash."""
        return self.config.validation if isinstance(self.config.validation, float) else 0.0

    def shards(self) -> dict[str, tuple[Source, list[Shard]]]:
        """The shards of each split that has some of its own.

        Raises:
            DataError: there is none, or one is in both splits.
        """
        train, pattern = self._find("train", self.config), self.config.validation
        if not isinstance(pattern, str):
            return {"train": train}
        validation = self._find("validation", self.config.model_copy(update={"files": pattern}))
        held_out = {shard.place for shard in validation[1]}
        shared = next((shard.name for shard in train[1] if shard.place in held_out), None)
        if shared is not None:
            raise DataError(
                f"{self.key}.validation: {pattern!r} and {self.pattern('train')}: {self.config.files!r} both match "
                f"{shared}; make the patterns disjoint, or set {self.key}.validation to null"
            )
        return {"train": train, "validation": validation}

    def pattern(self, split: str) -> str:
        """The key of the pattern of a split's shards."""
        return f"{self.key}.{'files' if split == 'train' and self.key != SHORT else split}"

    def _find(self, split: str, config: SourceConfig) -> tuple[Source, list[Shard]]:
        source = config.block(config)
        try:
            return source, source.shards()
        except DataError as error:
            if self.key == SHORT and isinstance(config.path, str) and not is_remote(config.path):
                find_shards(Path(config.path), config.files, self.pattern(split))  # says what is there
            raise DataError(f"{self.key}.{error}") from None


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
