"""States for decoding: values owned by the caller, made by `init_state`, updated in place."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.context import TokenContext


class State(Protocol):
    """What every block's decoding state offers."""

    def clone(self) -> State: ...

    def reorder(self, index: Tensor) -> None:
        """Row b continues what row index[b] had; index (B,)."""


@dataclasses.dataclass
class AttentionState:
    """Keys and values seen so far, each row's in slots of its own from the left: under MoD of what it let pass alone.

    Slots are made as they are needed, half as many again each time, so that growing costs a token no more than writing.

    An item with bidirectional attention is fed whole, in one call: tokens fed earlier are not computed again, so they
    cannot see what comes later. To compute an item several times after the same prefix (as diffusion sampling does),
    feed the prefix, then each time feed the item to a `clone`.
    """

    key: Tensor
    """(B, S, Hkv, K), rotated."""
    value: Tensor
    """(B, S, Hkv, K)."""
    document: Tensor
    """(B, S) int64, −1 where there is no token."""
    length: int
    """Most tokens of a row."""
    counts: tuple[int, ...]
    """Tokens that each row has, known on the host."""

    @classmethod
    def empty(cls, rows: int, length: int, heads: int, head_dim: int, like: Tensor) -> AttentionState:
        shape = (rows, 0, heads, head_dim)
        document = torch.full((rows, 0), -1, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(shape), like.new_zeros(shape), document, length, (0,) * rows)

    def append(self, key: Tensor, value: Tensor, context: TokenContext) -> tuple[Tensor, Tensor, Tensor] | None:
        """Add the T tokens a row of `context` and give everything seen so far.

        Args:
            key, value: (B, T, Hkv, K).
        Returns:
            keys and values (B, S, Hkv, K) of the S slots in use, and which of them each new token may see,
            (B, 1, T, S) bool: those of its document that came before or belong to its item. Padding sees the first.
            None where nothing had been seen: the tokens then see each other alone, as without a state.
        Raises:
            ValueError: the state was made for fewer tokens.
        """
        before, even = self.counts, not context.padded and len(set(self.counts)) == 1
        self.counts = tuple(map(sum, zip(before, context.row_counts, strict=True)))
        end = max(self.counts)
        self._make_room(end)
        first = torch.tensor(before, device=key.device)
        slot = first[:, None] + context.valid.cumsum(1) - 1  # (B, T)
        if even:
            place = slice(before[0], end)
            self.key[:, place], self.value[:, place], self.document[:, place] = key, value, context.document
        else:
            row = torch.arange(len(before), device=key.device)[:, None] * self.key.shape[1]
            new, place = context.tokens, (row + slot).reshape(-1).index_select(0, context.tokens)
            for kept, values in ((self.key, key), (self.value, value), (self.document, context.document)):
                kept.flatten(0, 1).index_copy_(0, place, values.flatten(0, 1).index_select(0, new))
        if not any(before):
            return None
        return self.key[:, :end], self.value[:, :end], self._mask(slot, context, end)

    def _mask(self, slot: Tensor, context: TokenContext, end: int) -> Tensor:
        """(B, 1, T, S) bool as `append` gives it; slot (B, T) of the new tokens."""
        every = torch.arange(end, device=slot.device)
        seen = every <= slot[..., None]  # (B, T, S)
        if context.item is not None:
            of_slot = torch.full((slot.shape[0], end), -1, device=slot.device)
            item = torch.where(context.valid, context.item, -1)
            of_slot = of_slot.scatter_reduce(1, slot.clamp_min(0), item, "amax")
            seen = seen | ((of_slot[:, None] == context.item[..., None]) & (context.item[..., None] >= 0))
        mask = seen & (self.document[:, None, :end] == context.document[..., None])
        if context.padded:
            mask = mask | (~context.valid[..., None] & (every == 0))
        return mask[:, None]

    def _make_room(self, slots: int) -> None:
        if slots > self.length:
            raise ValueError(f"state: {slots} tokens do not fit into {self.length} slots; make it with a larger length")
        there = self.key.shape[1]
        if slots > there:
            more = min(self.length, max(slots, there + there // 2, 16)) - there
            self.key, self.value = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.key, self.value))
            self.document = F.pad(self.document, (0, more), value=-1)

    def clone(self) -> AttentionState:
        return dataclasses.replace(self, key=self.key.clone(), value=self.value.clone(), document=self.document.clone())

    def reorder(self, index: Tensor) -> None:
        self.key, self.value, self.document = self.key[index], self.value[index], self.document[index]
        self.counts = tuple(self.counts[row] for row in index.tolist())


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
