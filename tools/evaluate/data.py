"""What a run is evaluated on: its own data, or any that `data.sources` of a recipe can name; and their documents."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from pretrain.data import Data, DataConfig, open_data
from pretrain.data.cache import cache_folder
from pretrain.data.errors import BrokenDocument, shown
from pretrain.data.index import Split
from pretrain.data.mixture import Mixture
from pretrain.data.reading import read_parts
from pretrain.data.sources import Document
from pretrain.data.sources.files import PIPE
from pretrain.data.workers import Task, find_tasks
from pretrain.recipe import Recipe
from pretrain.recipe_file import parse_yaml
from zoo.config import UserError
from zoo.generate import Part
from zoo.registry import known
from zoo.run import Run

OPEN = 16
"""From so many shards documents are drawn at most."""
YAML = (".yaml", ".yml")


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Data to evaluate on."""

    name: str
    config: DataConfig
    split: str
    """"train" or "validation" of `config`."""
    own: bool = False
    """The run's own."""

    def open(self, run: Run, seed: int) -> Data:
        """It as the run reads it, with the run's own modalities.

        Raises:
            UserError: it cannot be read, too many of its documents cannot be used, or nothing is held out.
        """
        modalities = {name: modality.config for name, modality in run.modalities.items()}
        data = open_data(self.config, modalities, seed, log=lambda line: tqdm.tqdm.write(f"{self.name}: {line}"))
        if self.split == "validation" and data.validation is None:
            raise UserError(f"data.validation: null: {run.folder} holds nothing out; name data to evaluate on")
        return data

    def stream(self, data: Data) -> Mixture:
        """Packed rows of what `open` gave."""
        stream = data.validation if self.split == "validation" else data.train
        assert stream is not None
        return stream


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A document that was drawn from the data."""

    key: str
    parts: Sequence[Part]


def own_data(recipe: Recipe, split: str = "validation", named: Sequence[str] = ()) -> Evaluated:
    """The run's own data.

    Args:
        recipe: of the run.
        split: "train" or "validation".
        named: what the command line has laid over the recipe.
    Raises:
        UserError: they come from a command that the run folder's recipe names; whoever wrote it would run it here.
    """
    for name, entry in recipe.data.entries.items():
        paths = [entry.config.path] if isinstance(entry.config.path, str) else entry.config.path
        pipe = next((path for path in paths if path.startswith(PIPE)), None)
        if pipe is not None and not any(pipe in word for word in named):
            raise UserError(
                f"data.sources.{name}.path: {shown(pipe)} stands in the recipe of a run folder, which runs no commands "
                "of itself; if you trust it, give the key and its value on the command line, or name other data"
            )
    return Evaluated(split, recipe.data, split, own=True)


def named_data(words: Sequence[str], recipe: Recipe) -> list[Evaluated]:
    """What DATA of the command line means, each by a name of its own.

    Args:
        words: `PATH` of shards of our documents, `TYPE:PATH` of another type of source, or a YAML file with sources by
            name, as `data.sources` of a recipe has them.
        recipe: of the run; its `data` section says everything else.
    Raises:
        UserError: a file is no such list, or a source has wrong keys.
    """
    found: list[Evaluated] = []
    for word in words:
        sources = _sources(word)
        taken = {each.name for each in found}
        for name, source in sources.items():
            free = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 2 + len(found)))) if n not in taken)
            section = recipe.data.model_dump(mode="json") | {"path": None, "sources": {free: source}}
            section |= {"token_ratio": None, "cache": recipe.data.cache}
            config = DataConfig.parse(section, "data")
            held_out = config.entries[free].config.validation is not None
            found.append(Evaluated(free, config, "validation" if held_out else "train"))
    return found


def _sources(word: str) -> dict[str, Any]:
    """The entries of `data.sources` that a word of the command line stands for."""
    if word.endswith(YAML):
        try:
            sources = parse_yaml(Path(word).read_text(encoding="utf-8"), word)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{word}: cannot be read ({error}); give a YAML file of sources by name") from None
        if not isinstance(sources, dict) or not all(isinstance(each, dict) for each in sources.values()):
            raise UserError(
                f"{word}: is no mapping of names to sources; write them as data.sources of a recipe has them"
            )
        return sources
    kind, colon, path = word.partition(":")
    if not colon or kind not in known("source"):
        kind, path = "documents", word
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name.split(".")[0]).strip("-_") or "data"
    return {name: {"type": kind, "path": path}}


def documents(run: Run, data: Evaluated, limit: int, seed: int) -> list[Sampled]:
    """Up to `limit` documents, drawn at random from at most `OPEN` shards; those that cannot be used are left out.

    Raises:
        UserError: none can be used; says why not, of one.
    """
    cache = cache_folder(data.config.folder, data.config.cache)
    tasks = [task for tasks in find_tasks(data.config).values() for task in tasks if _holds(task, data.split)]
    random = np.random.default_rng(seed)
    chosen = [tasks[n] for n in random.permutation(len(tasks))[:OPEN]]
    found: list[Sampled] = []
    broken: list[str] = []
    for number, task in enumerate(chosen):
        share = -(-(limit - len(found)) // (len(chosen) - number))
        with contextlib.closing(_drawn(run, task, data.split, cache, random, broken)) as drawn:
            found += [document for _, document in zip(range(share), drawn, strict=False)]
    if not found:
        raise UserError(f"{data.name}: no document can be used{f', such as {broken[0]}' if broken else ''}")
    return found


def _holds(task: Task, split: str) -> bool:
    return any(each.name == split for each in task.split.both)


def _drawn(
    run: Run, task: Task, split: str, cache: Path, random: np.random.Generator, broken: list[str]
) -> Generator[Sampled]:
    """The documents of a shard that belong to the split, in random order."""
    mine = Split(split, task.split.held_out)
    with task.source.open(task.shard, cache) as opened:
        for place in random.permutation(len(opened)).tolist():
            document = opened[place]
            if mine.has(document.key):
                try:
                    yield Sampled(document.key, _parts(run, document))
                except BrokenDocument as error:
                    broken.append(f"{shown(task.shard.name)}: {shown(document.key)}: {error}")


def _parts(run: Run, document: Document) -> list[Part]:
    names = {modality.config.part: name for name, modality in run.modalities.items()}
    readers = {part: run.modalities[name].config.read for part, name in names.items()}
    parts = []
    for part in read_parts(document, readers):
        if part.type not in names:
            raise BrokenDocument(f"it has {part.type}, of which {run.folder} has no modality")
        parts.append(Part(names[part.type], part.item))
    return parts


def described(
    run: Run, data: Evaluated, modality: str, limit: int, seed: int, kept: int | None = None
) -> list[tuple[str, str, Any]]:
    """(key, text, item) of documents that are one text and one item of a modality, in either order.

    Args:
        limit: how many documents are looked at.
        kept: how many are wanted at most.
    Raises:
        UserError: the run does not have the modality, or there are none.
    """
    if modality not in run.modalities or modality == run.vocabulary.text:
        others = [name for name in run.modalities if name != run.vocabulary.text]
        raise UserError(
            f"{modality!r}: {run.folder} has no such modality beside text; it has {', '.join(others) or 'none'}"
        )
    found = []
    for document in documents(run, data, limit, seed):
        by_name = {part.modality: part.item for part in document.parts}
        if set(by_name) == {run.vocabulary.text, modality} and len(document.parts) == 2:
            found.append((document.key, by_name[run.vocabulary.text], by_name[modality]))
    if not found:
        raise UserError(
            f"{data.name}: none of {limit:,} documents is one text and one {modality}; that is what this measure needs"
        )
    return found[:kept]
