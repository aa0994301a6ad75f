"""The grammar of the modalities as a logits processor of Transformers' `generate`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from zoo.carries import Ids
from zoo.modalities import Grammar, Vocabulary
from zoo.writing import MARKERS, inside_choices


class GrammarLogits(LogitsProcessor):
    """Logits −inf for tokens that may not come next, as `zoo.writing` has it when the model decides what follows.

    A function of the ids alone, so that beams may change places. Items whose positions carry no ids are never begun:
    `generate` writes ids.

    Args:
        length: most tokens of a row, the prompt and its padding included.
        drawn: modalities whose items are drawn from noise.
    """

    def __init__(
        self, grammars: Mapping[str, Grammar], vocabulary: Vocabulary, length: int, drawn: frozenset[str] = frozenset()
    ) -> None:
        self.text, self.length, self.eos = grammars[vocabulary.text], length, vocabulary.eos
        self.items = {
            begin: each
            for each in grammars.values()
            if (begin := each.begin) is not None and isinstance(each.carries, Ids) and each.name not in drawn
        }
        self.least = {
            begin: each.positions.least + MARKERS for begin, each in self.items.items() if each.positions is not None
        }
        """Fewest tokens of an item by its begin marker."""
        self.markers = np.array([token for each in grammars.values() for token in (each.begin, each.end) if token])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids (B, L), scores (B, V) → (B, V)."""
        allowed = torch.zeros(scores.shape, dtype=torch.bool)
        for row, ids in enumerate(input_ids.cpu().numpy()):
            for start, stop in self.choices(ids):
                allowed[row, start:stop] = True
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def choices(self, ids: np.ndarray) -> list[tuple[int, int]]:
        """Ranges [start, stop) of what may follow the ids (L,) of one row."""
        last = np.flatnonzero(np.isin(ids, self.markers))[-1:]
        item = self.items.get(int(ids[last[0]])) if len(last) else None
        if item is not None and item.positions is not None:
            content = list(ids[last[0] + 1 :] - item.choice.start)
            room = self.length - int(last[0]) - 2  # for the positions, after the begin marker and before the end marker
            return inside_choices(item, content, min(item.positions.most, room))
        room = self.length - len(ids)
        fitting = [begin for begin, least in self.least.items() if least <= room]
        return [self.text.choice[:2], (self.eos, self.eos + 1), *((begin, begin + 1) for begin in fitting)]
