"""The modalities a recipe asks for, ready for use: what they learn is read from the recipe's files, from the cache, or
learned from the training shards."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from pretrain.data.cache import cache_folder, room_for
from pretrain.data.config import DataConfig
from pretrain.data.errors import BrokenDocument, DataError, shown
from pretrain.data.index import REASON, Listing, Split, list_shard
from pretrain.data.reading import read_parts
from pretrain.data.sources import Document
from pretrain.data.workers import Task, find_tasks
from zoo.config import UserError
from zoo.files import atomic_path
from zoo.modalities import LearnedConfig, LearnedModality, Modalities, Modality, vocabulary
from zoo.noise import hash32

SHARDS = 256
"""From so many shards it is learned at most."""
NAMED = 5
"""How many broken documents an error lists."""


def load_modalities(
    modalities: Modalities, tasks: Sequence[Task], cache: Path, log: Callable[[str], None]
) -> dict[str, Modality]:
    """Every modality ready for use; those that learn and have no `path` learn once from the shards of `tasks`, and
    what they have learned is kept in `cache`.

    Raises:
        UserError: a file is missing or does not fit its config; there is nothing to learn from.
    """
    wanted = {name: config for name, config in learning(modalities).items() if config.path is None}
    lessons = _lessons(tasks, cache) if wanted else []
    shards = [[lesson.listing.checksum, *lesson.held_out] for lesson in lessons]
    files = {
        name: _cached(name, config, shards, cache) if config.path is None else Path(config.path)
        for name, config in learning(modalities).items()
    }
    learned = {name: _loaded(config, files[name]) for name, config in learning(modalities).items()}
    missing = [name for name, modality in learned.items() if modality is None]
    if missing:
        for name, modality in _fit(modalities, lessons, missing, cache, log).items():
            with atomic_path(files[name]) as temporary:
                modality.save(temporary)
    return {
        name: config.load(files[name]) if isinstance(config, LearnedConfig) else config.open()
        for name, config in modalities.items()
    }


@dataclasses.dataclass(frozen=True)
class Lesson:
    """A shard from which modalities learn."""

    listing: Listing
    split: Split

    @property
    def held_out(self) -> list[float]:
        """The share of its documents that is held out, if any."""
        return [self.split.held_out] if self.split.held_out else []


def _lessons(tasks: Sequence[Task], cache: Path) -> list[Lesson]:
    """The shards that modalities learn from: all, or SHARDS of them, scattered."""
    chosen = sorted(np.argsort(hash32(np.arange(len(tasks))), kind="stable")[:SHARDS].tolist())
    chosen = tqdm.tqdm(chosen, desc="listing shards", unit="shard", disable=None, leave=False)
    return [Lesson(list_shard(tasks[n].source, tasks[n].shard, cache), tasks[n].split) for n in chosen]


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


def _fit(
    modalities: Modalities, lessons: Sequence[Lesson], names: Iterable[str], cache: Path, log: Callable[[str], None]
) -> dict[str, LearnedModality]:
    """Let the modalities `names` learn; a function of the content of the shards alone."""
    chosen = {name: config for name, config in learning(modalities).items() if name in names}
    total = sum(len(lesson.listing) for lesson in lessons)
    log(f"training the {' and the '.join(chosen)} tokenizer on {total:,} documents")
    items, broken = _sample(chosen, lessons, cache)
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
    tasks = [task for tasks in find_tasks(config).values() for task in tasks if task.split.name == "train"]
    cache = cache_folder(config.folder, config.cache)
    names = list(learning(modalities))
    if not names:
        kinds = ", ".join(f"{name} is {modality.type_name!r}" for name, modality in modalities.items())
        raise UserError(f"modalities: {kinds}: none of them learns anything, there is nothing to do")
    out.mkdir(parents=True, exist_ok=True)
    files = []
    with room_for(cache):
        learned = _fit(modalities, _lessons(tasks, cache), names, cache, log)
    for name, modality in learned.items():
        files.append(out / f"{name}{learning(modalities)[name].file}")
        modality.save(files[-1])
    return files


def fingerprint(modalities: Mapping[str, Modality]) -> str:
    """Hash of everything that decides the tokens of a document."""
    parts = [[name, modality.fingerprint] for name, modality in modalities.items()]
    sizes = vocabulary({name: modality.config for name, modality in modalities.items()}).sizes
    return hashlib.sha256(json.dumps([parts, list(sizes.items())]).encode()).hexdigest()


def _cached(name: str, config: LearnedConfig, shards: list[list[Any]], cache: Path) -> Path:
    recipe = json.dumps([config.model_dump(), shards], sort_keys=True)
    return cache / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:32]}{config.file}"


def _sample(
    modalities: Mapping[str, LearnedConfig], lessons: Sequence[Lesson], cache: Path
) -> tuple[dict[str, list[Any]], list[str]]:
    """Items of each modality from documents of all shards alike, in a scattered order, up to `fit_limit`; and a line
    for each document that was met and cannot be used."""
    stops = np.cumsum([len(lesson.listing) for lesson in lessons])
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
            listing = lessons[number].listing
            if number not in opened:
                opened[number] = stack.enter_context(listing.source.open(listing.shard, cache))
            document = opened[number][place - int(stops[number])]  # counted from its end
            if not lessons[number].split.has(document.key):
                continue
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
