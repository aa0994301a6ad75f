"""The zoo's decoding states as a cache of Transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from zoo.config import UserError
from zoo.states import State

UNBOUNDED = 2**40
"""Most tokens of a row; states make room as tokens come."""


class ZooCache(Cache):
    """What a model has seen of B rows: the states of all layers, keys and values of the tokens that a layer let pass
    alone, and where each row is in its document. Empty until the first forward."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.states: list[State | None] = []
        self.columns = 0
        """Tokens of a row so far, padding included."""
        self.lengths = np.zeros(0, np.int64)
        """(B,) tokens of the document that each row is in."""
        self.documents = np.zeros(0, np.int64)
        """(B,) number of that document in its row, −1 before the first."""
        self.inside = np.zeros(0, bool)
        """(B,) whether the last token was of an item that sees all of itself."""

    def begin(self, states: list[State | None], rows: int) -> None:
        """Take the empty states of a model for B rows."""
        self.states, self.lengths, self.inside = states, np.zeros(rows, np.int64), np.zeros(rows, bool)
        self.documents = np.full(rows, -1, np.int64)

    def check_rows(self, rows: int) -> None:
        """Raise UserError where it was made for another number of rows."""
        if rows != len(self.lengths):
            raise UserError(f"past_key_values: holds {len(self.lengths)} rows, but there are {rows}; give a new one")

    def __len__(self) -> int:
        return len(self.states)

    def __repr__(self) -> str:
        return f"ZooCache({len(self.lengths)} rows, {self.columns} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b goes on with what row beam_idx[b] had."""
        host = beam_idx.cpu().numpy()
        for state in self.states:
            if state is not None:
                state.reorder(beam_idx)
        self.lengths, self.documents, self.inside = self.lengths[host], self.documents[host], self.inside[host]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def reset(self) -> None:
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        raise UserError("past_key_values: states of recurrent and routed layers cannot forget their last tokens")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise UserError("past_key_values: a ZooCache belongs to models of the zoo, whose layers keep their own states")
