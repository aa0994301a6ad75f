"""The modalities a recipe asks for, ready for use: what they learn is read from the recipe's files, from the cache, or
learned from the training shards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.cache import cache_folder
from pretrain.data.config import DataConfig
from pretrain.data.index import Listing, list_shard
from pretrain.data.reading import BrokenDocument, read_parts
from pretrain.data.shards import find_shards
from zoo.config import UserError
from zoo.files import atomic_path
from zoo.modalities import LearnedConfig, LearnedModality, Modalities, Modality, vocabulary
from zoo.noise import hash32


def load_modalities(
    modalities: Modalities, listings: list[Listing], cache: Path, log: Callable[[str], None]
) -> dict[str, Modality]:
    """Every modality ready for use; those that learn and have no `path` learn once from the shards of `listings`, and
    what they have learned is kept in `cache`.

    Raises:
        UserError: a file is missing or does not fit its config; there is nothing to learn from.
    """
    shards = [listing.checksum for listing in listings]
    files = {
        name: _cached(name, config, shards, cache) if config.path is None else Path(config.path)
        for name, config in learning(modalities).items()
    }
    missing = [
        name for name, config in learning(modalities).items() if config.path is None and not files[name].exists()
    ]
    if missing:
        for name, modality in fit(modalities, listings, missing, log).items():
            with atomic_path(files[name]) as temporary:
                modality.save(temporary)
    return {
        name: config.load(files[name]) if isinstance(config, LearnedConfig) else config.block(config)
        for name, config in modalities.items()
    }


def learning(modalities: Modalities) -> dict[str, LearnedConfig]:
    """Those that learn something from data."""
    return {name: config for name, config in modalities.items() if isinstance(config, LearnedConfig)}


def fit(
    modalities: Modalities, listings: list[Listing], names: Iterable[str], log: Callable[[str], None]
) -> dict[str, LearnedModality]:
    """Let the modalities `names` learn from the shards of `listings`; a function of their content alone."""
    chosen = {name: config for name, config in learning(modalities).items() if name in names}
    log(f"training the {' and the '.join(chosen)} tokenizer on {sum(map(len, listings)):,} documents")
    items = _sample(chosen, listings)
    return {name: config.fit(items[name]) for name, config in chosen.items()}


def fit_and_save(config: DataConfig, modalities: Modalities, out: Path, log: Callable[[str], None]) -> list[Path]:
    """Let every modality that learns do so on the training shards, and save what it learned in the folder `out`.

    Returns:
        the files written, in the order of the modalities.
    Raises:
        UserError: the shards cannot be read, or nothing learns.
    """
    folder = Path(config.path)
    cache = cache_folder(folder, config.cache)
    listings = [list_shard(shard, cache) for shard in find_shards(folder, config.train, "data.train")]
    names = list(learning(modalities))
    if not names:
        kinds = ", ".join(f"{name} is {modality.type_name!r}" for name, modality in modalities.items())
        raise UserError(f"modalities: {kinds}: none of them learns anything, there is nothing to do")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, modality in fit(modalities, listings, names, log).items():
        files.append(out / f"{name}{learning(modalities)[name].file}")
        modality.save(files[-1])
    return files


def fingerprint(modalities: Mapping[str, Modality]) -> str:
    """Hash of everything that decides the tokens of a document."""
    parts = [[name, modality.fingerprint] for name, modality in modalities.items()]
    sizes = vocabulary({name: modality.config for name, modality in modalities.items()}).sizes
    return hashlib.sha256(json.dumps([parts, list(sizes.items())]).encode()).hexdigest()


def _cached(name: str, config: LearnedConfig, shards: list[str], cache: Path) -> Path:
    recipe = json.dumps([config.model_dump(), shards], sort_keys=True)
    return cache / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}{config.file}"


def _sample(modalities: Mapping[str, LearnedConfig], listings: Iterable[Listing]) -> dict[str, list[Any]]:
    """Items of each modality from documents of all shards alike, in a scattered order, up to `fit_limit`."""
    places = [(listing.shard, entry) for listing in listings for entry in listing.entries()]
    items: dict[str, list[Any]] = {name: [] for name in modalities}
    room = {name: config.fit_limit for name, config in modalities.items()}
    for place in np.argsort(hash32(np.arange(len(places)))).tolist():
        shard, entry = places[place]
        names = {config.part: name for name, config in modalities.items() if room[name] > 0}
        if not names:
            break
        with open(shard, "rb") as file:
            try:
                parts = list(read_parts(file, entry, {kind: modalities[name].read for kind, name in names.items()}))
            except BrokenDocument:
                continue  # indexing counts and names it
        for part in parts:
            if part.type in names:
                name = names[part.type]
                items[name].append(part.item)
                room[name] -= modalities[name].extent(part.item)
    return items
