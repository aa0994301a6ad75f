"""Captions and the items they describe, both ways, by likelihood: how well a model says a caption after its item, and
whether it finds the right one among several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from tools.evaluate.data import Evaluated, described
from tools.evaluate.judging import Share
from zoo.config import UserError
from zoo.generate import Part, check_causal
from zoo.likelihood import Likelihood, check_likelihood, likelihoods
from zoo.run import Run

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Retrieval:
    """What was found of n described items."""

    modality: str
    documents: int
    candidates: int
    """Captions, or items, among which the right one is to be found; chance finds 1 / candidates."""
    caption_nats: float
    """Mean nats of a caption, with the document's end, after its item."""
    caption_perplexity: float
    """Perplexity of a token of those."""
    caption_nats_after_another: float
    """The same after another item of the candidates, a mean over all."""
    caption_nats_alone: float
    """The same with nothing before it."""
    item_to_text: Share
    """The right caption gains most by the item: log p(caption | item) − log p(caption)."""
    text_to_item: Share
    """The right item makes the caption likeliest: log p(caption | item)."""
    text_to_item_by_item: Share | None
    """The right item gains most by the caption: log p(item | caption) − log p(item); None where a model says no
    likelihood of items."""

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def retrieve(run: Run, data: Evaluated, modality: str, limit: int, candidates: int, seed: int) -> Retrieval:
    """Score all captions of a group after all of its items; in a group every caption is another.

    Args:
        modality: of the items.
        limit: documents to read.
        candidates: captions of a group; fewer where the data have fewer different ones.
    Raises:
        UserError: the documents are too few or too alike, or the run has no causal mode.
    """
    check_causal(run)
    found = described(run, data, modality, limit, seed)
    groups = grouped([text for _, text, _ in found], candidates)
    if not groups:
        raise UserError(f"{data.name}: {len(found)} documents say one and the same; candidates need different captions")
    items = [Part(modality, item) for _, _, item in found]
    texts = [text for _, text, _ in found]
    by_item = _says_likelihood(run, modality)
    tokens = 0
    after, alone, before, blank = [], [], [], []
    for group in tqdm.tqdm(groups, desc="scoring", unit="group", disable=None, leave=False):
        pictures, captions = [[items[n]] for n in group], [texts[n] for n in group]
        matrix = _scores(run, pictures, captions)
        tokens += sum(row[n].tokens for n, row in enumerate(matrix))
        after.append(_nats(matrix))
        alone.append(_nats(_scores(run, [[]], captions)))
        if by_item:
            wanted = [items[n] for n in group]
            before.append(_nats(_scores(run, [[caption] for caption in captions], wanted)))
            blank.append(_nats(_scores(run, [[]], wanted)))
    said, single = np.array(after), np.array(alone)  # (groups, items, captions), (groups, 1, captions)
    right = np.arange(said.shape[1])
    own = said[:, right, right]
    others = (said.sum((1, 2)) - own.sum(1)).sum() / (own.size * (said.shape[1] - 1))
    drawn = None
    if by_item:
        gain = np.array(before) - np.array(blank)  # (groups, captions, items)
        drawn = Share.of((gain.argmax(2) == right).astype(float).ravel())
    return Retrieval(
        modality,
        own.size,
        said.shape[1],
        -float(own.mean()),
        math.exp(min(-float(own.sum()) / tokens, 700)),
        -float(others),
        -float(single.mean()),
        Share.of(((said - single).argmax(2) == right).astype(float).ravel()),
        Share.of((said.argmax(1) == right).astype(float).ravel()),
        drawn,
    )


def grouped(texts: Sequence[str], size: int) -> list[list[int]]:
    """Numbers of texts in groups of `size`, or of as many different ones as there are, no two alike in a group; each
    text stands in one group at most, and those that fill none are left out."""
    size = min(size, len(set(texts)))
    if size < 2:
        return []
    open_groups: list[tuple[list[int], set[str]]] = []
    done = []
    for number, text in enumerate(texts):
        group = next((each for each in open_groups if text not in each[1]), None)
        if group is None:
            group = ([], set())
            open_groups.append(group)
        group[0].append(number)
        group[1].add(text)
        if len(group[0]) == size:
            open_groups.remove(group)
            done.append(group[0])
    return done


def _says_likelihood(run: Run, modality: str) -> bool:
    try:
        check_likelihood(run, modality)
    except UserError:
        return False
    return True


def _scores(run: Run, prompts: Sequence[Any], parts: Sequence[Any]) -> list[list[Likelihood]]:
    """How likely each part is after each prompt."""
    found = likelihoods(run, [(prompt, part) for prompt in prompts for part in parts], batch=BATCH)
    return [found[start : start + len(parts)] for start in range(0, len(found), len(parts))]


def _nats(scores: Sequence[Sequence[Likelihood]]) -> np.ndarray:
    """(prompts, parts) log-likelihoods."""
    return np.array([[each.nats for each in row] for row in scores])
