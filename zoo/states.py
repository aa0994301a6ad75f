"""States for decoding: values owned by the caller, made by `init_state`, updated in place."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor


class State(Protocol):
    """What every block's decoding state offers."""

    def clone(self) -> State: ...

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] had; index (B,)."""


@dataclasses.dataclass
class AttentionState:
    """Keys and values seen so far; S slots a row, filled from the left.

    Under MoD rows advance unevenly: a column then holds a token in some rows and padding (document −1) in others.
    """

    key: Tensor
    """(B, S, Hkv, K), rotated."""
    value: Tensor
    """(B, S, Hkv, K)."""
    document: Tensor
    """(B, S), −1 where there is no token."""
    used: int = 0

    @classmethod
    def empty(cls, rows: int, slots: int, heads: int, head_dim: int, like: Tensor) -> AttentionState:
        shape = (rows, slots, heads, head_dim)
        document = torch.full((rows, slots), -1, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), document)

    def append(self, key: Tensor, value: Tensor, document: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add T tokens a row and give everything seen so far: (B, used, Hkv, K) twice and documents (B, used).

        Raises:
            ValueError: the state was made for fewer tokens.
        """
        end = self.used + key.shape[1]
        if end > self.key.shape[1]:
            raise ValueError(
                f"state: {end} tokens do not fit into {self.key.shape[1]} slots; make it with a larger length"
            )
        self.key[:, self.used : end] = key
        self.value[:, self.used : end] = value
        self.document[:, self.used : end] = document
        self.used = end
        return self.key[:, :end], self.value[:, :end], self.document[:, :end]

    def clone(self) -> AttentionState:
        return AttentionState(self.key.clone(), self.value.clone(), self.document.clone(), self.used)

    def reorder(self, index: Tensor) -> None:
        self.key, self.value, self.document = self.key[index], self.value[index], self.document[index]
