"""States for decoding: values owned by the caller, made by `init_state`, updated in place."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext, same_item


class State(Protocol):
    """What every block's decoding state offers."""

    def clone(self) -> State: ...

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] had; index (B,)."""


@dataclasses.dataclass
class AttentionState:
    """Keys and values seen so far; S slots a row, filled from the left.

    Under MoD rows advance unevenly: a column then holds a token in some rows and padding (document −1) in others.

    An item with bidirectional attention is fed whole, in one call: tokens fed earlier are not computed again, so they
    cannot see what comes later. To compute an item several times after the same prefix (as diffusion sampling does),
    feed the prefix, then each time feed the item to a `clone`.
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

    def append(self, key: Tensor, value: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, Tensor]:
        """Add the T tokens a row of `context` and give everything seen so far.

        Args:
            key, value: (B, T, Hkv, K).
        Returns:
            keys and values (B, S, Hkv, K) of the S tokens seen so far, and which of them each new token may see,
            (B, 1, T, S) bool: those of its document that came before or belong to its item.
        Raises:
            ValueError: the state was made for fewer tokens.
        """
        before, end = self.used, self.used + key.shape[1]
        if end > self.key.shape[1]:
            raise ValueError(
                f"state: {end} tokens do not fit into {self.key.shape[1]} slots; make it with a larger length"
            )
        self.key[:, before:end] = key
        self.value[:, before:end] = value
        self.document[:, before:end] = context.document
        self.used = end
        slot = torch.arange(end, device=key.device)
        seen = slot[None, :] <= slot[before:, None]
        if context.item is not None:
            seen = seen | F.pad(same_item(context.item), (before, 0))
        mask = seen & (context.document[:, None, :, None] == self.document[:, None, None, :end])
        return self.key[:, :end], self.value[:, :end], mask

    def clone(self) -> AttentionState:
        return AttentionState(self.key.clone(), self.value.clone(), self.document.clone(), self.used)

    def reorder(self, index: Tensor) -> None:
        self.key, self.value, self.document = self.key[index], self.value[index], self.document[index]


@dataclasses.dataclass
class MambaState:
    """What a recurrent mixer keeps of the tokens seen so far: a few numbers, however many they were.

    A row without a token in some step (padding, or skipped by a depth router) keeps what it had.
    """

    window: Tensor
    """(B, k − 1, W), the last inputs of the convolution, 0 before the document's beginning."""
    hidden: Tensor
    """(B, …) state of the scan; fp32 or wider."""
    document: Tensor
    """(B,) id of the document both belong to, −1 before the first token."""

    @classmethod
    def empty(cls, rows: int, window: tuple[int, int], hidden: tuple[int, ...], like: Tensor) -> MambaState:
        wide = torch.promote_types(like.dtype, torch.float32)
        document = torch.full((rows,), -1, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(rows, *window), like.new_zeros(rows, *hidden, dtype=wide), document)

    def update(self, window: Tensor, hidden: Tensor, document: Tensor) -> None:
        """Take what these tokens left; `document` (B, T) is theirs, −1 where there is no token."""
        self.window, self.hidden = window, hidden
        column = torch.arange(document.shape[1], device=document.device)
        last = torch.where(document >= 0, column, -1).amax(1, keepdim=True)
        newest = document.gather(1, last.clamp(min=0))[:, 0]
        self.document = torch.where(last[:, 0] >= 0, newest, self.document)

    def clone(self) -> MambaState:
        return MambaState(self.window.clone(), self.hidden.clone(), self.document.clone())

    def reorder(self, index: Tensor) -> None:
        self.window, self.hidden, self.document = self.window[index], self.hidden[index], self.document[index]
