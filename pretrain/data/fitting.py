"""The modalities a recipe asks for, ready for use: what they learn is read from the recipe's files, from the cache, or
learned from the training shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.cache import cache_folder
from pretrain.data.config import DataConfig
from pretrain.data.errors import BrokenDocument, DataError, shown
from pretrain.data.index import REASON, Listing, list_shard
from pretrain.data.reading import read_parts
from pretrain.data.shards import find_shards
from pretrain.data.sources import Document, DocumentShards, Shard
from zoo.config import UserError
from zoo.files import atomic_path
from zoo.modalities import LearnedConfig, LearnedModality, Modalities, Modality, vocabulary
from zoo.noise import hash32

SHARDS = 256
"""From so many shards it is learned at most."""
NAMED = 5
"""How many broken documents an error lists."""


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
    learned = {name: _loaded(config, files[name]) for name, config in learning(modalities).items()}
    missing = [name for name, modality in learned.items() if modality is None]
    if missing:
        for name, modality in fit(modalities, listings, missing, cache, log).items():
            with atomic_path(files[name]) as temporary:
                modality.save(temporary)
    return {
        name: config.load(files[name]) if isinstance(config, LearnedConfig) else config.block(config)
        for name, config in modalities.items()
    }


def _loaded(config: LearnedConfig, file: Path) -> LearnedModality | None:
    """What the modality has learned, or None where it is still to learn it: a file in the cache may be damaged."""
    try:
        return config.load(file)
    except UserError:
        if config.path is not None:
            raise
        return None


def learning(modalities: Modalities) -> dict[str, LearnedConfig]:
    """Those that learn something from data."""
    return {name: config for name, config in modalities.items() if isinstance(config, LearnedConfig)}


def fit(
    modalities: Modalities, listings: list[Listing], names: Iterable[str], cache: Path, log: Callable[[str], None]
) -> dict[str, LearnedModality]:
    """Let the modalities `names` learn from the shards of `listings`; a function of their content alone."""
    if len(listings) > SHARDS:
        listings = [listings[n] for n in sorted(np.argsort(hash32(np.arange(len(listings))))[:SHARDS])]
    chosen = {name: config for name, config in learning(modalities).items() if name in names}
    log(f"training the {' and the '.join(chosen)} tokenizer on {sum(map(len, listings)):,} documents")
    items, broken = _sample(chosen, listings, cache)
    for name, config in chosen.items():
        if not items[name] and broken:
            reasons = "\n  ".join(broken[:NAMED])
            raise DataError(
                f"modalities.{name}: no document has a usable {config.part} to learn from; {len(broken)} documents "
                f"cannot be used, such as\n  {reasons}"
            )
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
    source = DocumentShards(DocumentShards.Config(path=config.path))
    shards = [Shard(str(file)) for file in find_shards(folder, config.train, "data.train")]
    listings = [list_shard(source, shard, cache) for shard in shards]
    names = list(learning(modalities))
    if not names:
        kinds = ", ".join(f"{name} is {modality.type_name!r}" for name, modality in modalities.items())
        raise UserError(f"modalities: {kinds}: none of them learns anything, there is nothing to do")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for name, modality in fit(modalities, listings, names, cache, log).items():
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


def _sample(
    modalities: Mapping[str, LearnedConfig], listings: Sequence[Listing], cache: Path
) -> tuple[dict[str, list[Any]], list[str]]:
    """Items of each modality from documents of all shards alike, in a scattered order, up to `fit_limit`; and a line
    for each document that was met and cannot be used."""
    stops = np.cumsum([len(listing) for listing in listings])
    items: dict[str, list[Any]] = {name: [] for name in modalities}
    broken: list[str] = []
    room = {name: config.fit_limit for name, config in modalities.items()}
    with contextlib.ExitStack() as stack:
        opened: dict[int, Sequence[Document]] = {}
        for place in np.argsort(hash32(np.arange(stops[-1] if len(stops) else 0))).tolist():
            names = {config.part: name for name, config in modalities.items() if room[name] > 0}
            if not names:
                break
            number = int(np.searchsorted(stops, place, side="right"))
            listing = listings[number]
            if number not in opened:
                opened[number] = stack.enter_context(listing.source.open(listing.shard, cache))
            document = opened[number][place - int(stops[number])]  # counted from its end
            try:
                parts = list(read_parts(document, {kind: modalities[name].read for kind, name in names.items()}))
            except BrokenDocument as error:
                broken.append(f"{shown(listing.shard.name)}: {shown(document.key)}: {shown(str(error), REASON)}")
                continue  # indexing counts and names it
            for part in parts:
                if part.type in names:
                    name = names[part.type]
                    items[name].append(part.item)
                    room[name] -= modalities[name].extent(part.item)
    return items, broken
