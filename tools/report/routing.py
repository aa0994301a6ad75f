"""Where the tokens of a document went in a model: which layers let them pass, and which experts took them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from zoo.context import CAUSAL, TOPK, TokenContext
from zoo.depth import MixtureOfDepths
from zoo.experts import ExpertGroup
from zoo.generate import Part, check_causal, document
from zoo.modalities import Piece
from zoo.prefix import together
from zoo.run import Run
from zoo.trace import Trace


@dataclasses.dataclass(frozen=True)
class Item:
    """An item in a document: T tokens, of which those in [start, stop) are its positions."""

    part: Part
    """As the model sees it."""
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Routed:
    """One document of T tokens and what became of each."""

    labels: Sequence[str]
    """(T) what each token is: a piece of text, or the name of a marker or a modality."""
    modality: np.ndarray
    """(T,) number of the modality of each."""
    items: Sequence[Item]
    passed: Mapping[str, np.ndarray]
    """Name of each Mixture-of-Depths layer → (T,) bool: the tokens that it let pass."""
    experts: Mapping[str, np.ndarray]
    """Name of each group of experts → (T, E) bool: the tokens that each expert took."""

    def layers(self) -> dict[int, list[str]]:
        """Names of the routed blocks of each layer that has any, by its number."""
        found: dict[int, list[str]] = {}
        for name in sorted((*self.passed, *self.experts), key=len):
            found.setdefault(layer_of(name), []).append(name)
        return dict(sorted(found.items()))

    def path(self, token: int) -> str:
        """Where a token went, in words: "layer 0: text expert 2; layer 1: skipped"."""
        said = []
        for layer, names in self.layers().items():
            words = []
            for name in names:
                if name in self.passed:
                    words.append("passes" if self.passed[name][token] else "skipped")
                elif taken := np.flatnonzero(self.experts[name][token]).tolist():
                    words.append(f"{group_of(name)} expert{'s' * (len(taken) > 1)} {', '.join(map(str, taken))}")
            said.append(f"layer {layer}: {', '.join(words) or 'no expert'}")
        return "; ".join(said) or "no routed layers"


def layer_of(name: str) -> int:
    """The number of the layer in the dotted name of a block; 0 where there is none."""
    match = re.search(r"layers\.(\d+)", name)
    return int(match[1]) if match else 0


def group_of(name: str) -> str:
    """The name of a group of experts, or "depth"."""
    return name.rpartition("groups.")[2] if "groups." in name else "depth"


@torch.no_grad()
def look(run: Run, parts: Sequence[Part | str], routing: str = CAUSAL) -> Routed:
    """What becomes of a document, its end included.

    Args:
        routing: "causal" or "topk"; a run without routers that look ahead is causal under both.
    Raises:
        UserError: a part does not fit, or blocks have no auxiliary routers to be causal with.
    """
    assert routing in (CAUSAL, TOPK)
    if routing == CAUSAL:
        check_causal(run)
    piece = Piece.join([document(run, parts), Piece.of([run.vocabulary.eos], run.grammars[run.vocabulary.text].text)])
    batch = together([piece], run.model, [0], [0])
    trace = Trace()
    context = batch.context.replace(routing=routing, trace=trace)
    run.model(batch.tokens, context, content=batch.content)
    passed, experts = _decisions(run, trace, context)
    return Routed(_labels(run, piece), piece.modality, _items(run, piece), passed, experts)


def _decisions(run: Run, trace: Trace, context: TokenContext) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What the routed blocks decided about the one row of a batch, in its own columns."""
    width = context.shape[1]
    blocks = {b.name: b for b in run.model.modules() if isinstance(b, MixtureOfDepths | ExpertGroup)}
    seen = {"": (context, np.arange(width))}  # what comes into a layer: its context, and the columns it has of the row
    passed: dict[str, np.ndarray] = {}
    experts: dict[str, np.ndarray] = {}
    for name in sorted(blocks, key=len):  # a layer before what it wraps
        if name not in trace.decisions:
            continue
        block, decision = blocks[name], trace.decisions[name]
        inner, columns = seen[max((each for each in seen if not each or name.startswith(f"{each}.")), key=len)]
        if isinstance(block, MixtureOfDepths):
            kept = columns[decision.selection.index[0, : decision.selection.counts[0]].cpu().numpy()]
            passed[name] = np.isin(np.arange(width), kept)
            seen[name] = (decision.context, kept)
        else:
            candidates = block.candidates(inner).index.cpu().numpy()
            experts[name] = np.zeros((width, block.count), bool)
            taken = decision.mask(len(candidates))[:, : block.count].cpu().numpy()
            experts[name][columns[candidates]] = taken
    return passed, experts


def _labels(run: Run, piece: Piece) -> list[str]:
    """What each token is."""
    markers = {number: name for name, number in run.vocabulary.specials.items()}
    start, stop, _ = run.grammars[run.vocabulary.text].choice
    names, text = list(run.modalities), run.modalities[run.vocabulary.text]
    return [
        text.decode(np.array([token - start])) if start <= token < stop else markers.get(token, names[modality])
        for token, modality in zip(piece.tokens.tolist(), piece.modality.tolist(), strict=True)
    ]


def _items(run: Run, piece: Piece) -> list[Item]:
    """The items of a document, decoded from their positions."""
    found: list[Item] = []
    for name, grammar in run.grammars.items():
        starts, taken = np.flatnonzero(piece.tokens == grammar.begin) if grammar.begin is not None else [], 0
        for start in starts:
            stop = int(start) + 1 + int(np.argmax(piece.tokens[start + 1 :] == grammar.end))
            first, count = int(start) + 1, stop - int(start) - 1
            carried = piece.content.get(name)
            ids = piece.tokens[first:stop] - grammar.choice.start
            content = ids if carried is None else carried[taken : taken + count]
            taken += count
            found.append(Item(Part(name, run.modalities[name].decode(content)), first, stop))
    return sorted(found, key=lambda item: item.start)
