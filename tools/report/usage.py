"""Over several routed documents: which words and patches each expert took, and how often each layer kept a patch."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from tools.report.drawing import colour, grid_shape
from tools.report.routing import Routed, group_of, layer_of
from tools.sweep.pretrain.tables import Table
from zoo.run import Run

WORDS = 10
"""Words of an expert that are named."""
FEWEST = 2
"""A word must occur so often to be named."""


@dataclasses.dataclass(frozen=True)
class Map:
    """How often something met each patch of a picture."""

    name: str
    rows: int
    columns: int
    shares: list[float]
    """From 0 to 1, in raster order."""
    color: str


def word_table(run: Run, documents: Sequence[Routed]) -> Table:
    """The words of each expert: those of which it took the largest part."""
    text = list(run.modalities).index(run.vocabulary.text)
    rows = []
    for name in _groups(documents):
        occurs: collections.Counter[str] = collections.Counter()
        taken: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for routed in documents:
            for token in np.flatnonzero(routed.modality == text).tolist():
                occurs[routed.labels[token]] += 1
                for expert in np.flatnonzero(routed.experts[name][token]).tolist():
                    taken[expert][routed.labels[token]] += 1
        for expert, words in sorted(taken.items()):
            often = [word for word in words if occurs[word] >= FEWEST] or list(words)
            best = sorted(often, key=lambda word: (-words[word] / occurs[word], -words[word], word))[:WORDS]
            said = ", ".join(f"{_shown(word)} {words[word]}/{occurs[word]}" for word in best)
            rows.append([f"{layer_of(name)}", group_of(name), f"{expert}", f"{words.total()}", said])
    text_ = (
        f"Tokens of text of which each expert took most, with how many of how many, of {len(documents)} documents; "
        f"those that occur {FEWEST} times at least."
    )
    return Table("Words of experts", text_, ["layer", "experts of", "expert", "tokens", "words"], rows)


def maps(run: Run, documents: Sequence[Routed]) -> list[tuple[str, list[Map]]]:
    """For each routed layer or group that pictures of one shape come to: how often each patch was kept, or taken by
    each expert."""
    found = []
    for name, modality, (rows, columns), grids in _pictures(run, documents):
        count = rows * columns
        passed = [routed.passed[name][start:stop][-count:] for routed, start, stop in grids if name in routed.passed]
        if passed:
            shares = np.mean(passed, axis=0).tolist()
            found.append((f"layer {layer_of(name)}: {modality} kept", [Map("kept", rows, columns, shares, "#0a0a2a")]))
            continue
        taken = np.mean([routed.experts[name][start:stop][-count:] for routed, start, stop in grids], axis=0)
        each = [
            Map(f"expert {expert}", rows, columns, taken[:, expert].tolist(), colour(expert, 1.0))
            for expert in range(taken.shape[1])
        ]
        if taken.any():
            found.append((f"layer {layer_of(name)}: experts of {group_of(name)} on {modality}", each))
    return found


def _pictures(
    run: Run, documents: Sequence[Routed]
) -> Iterator[tuple[str, str, tuple[int, int], list[tuple[Routed, int, int]]]]:
    """Each routed block with each modality of pictures, their most frequent shape, and where they stand."""
    shapes: dict[tuple[str, tuple[int, int]], list[tuple[Routed, int, int]]] = collections.defaultdict(list)
    for routed in documents:
        for item in routed.items:
            shape = grid_shape(run.modalities[item.part.modality], item.part.item, item.stop - item.start)
            if shape is not None:
                shapes[item.part.modality, shape].append((routed, item.start, item.stop))
    names = sorted({name for routed in documents for name in (*routed.passed, *routed.experts)}, key=_order)
    for name in names:
        for modality in dict.fromkeys(modality for modality, _ in shapes):
            shape = max((s for m, s in shapes if m == modality), key=lambda s: len(shapes[modality, s]))
            yield name, modality, shape, shapes[modality, shape]


def _groups(documents: Sequence[Routed]) -> list[str]:
    return sorted({name for routed in documents for name in routed.experts}, key=_order)


def _order(name: str) -> tuple[int, str]:
    return layer_of(name), name


def _shown(word: str) -> str:
    return repr(word) if word.strip() != word or not word.isprintable() else word
