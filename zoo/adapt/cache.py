"""A key/value cache whose routed layers hold the kept tokens alone.

A slot remembers which token of the dense stream it holds (its column), so that the mask of a routed layer is always a
selection of rows and columns of the dense model's mask: padding, bidirectional image blocks and anything else that a
family puts into it stay exact. To the rest of Transformers the layer has its dense length: positions and the masks of
dense layers come out as if nothing were skipped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from zoo.config import UserError


class RoutedLayer(DynamicLayer):
    """Keys and values (B, H, S, K) of the kept tokens, S the largest row's count; shorter rows leave slots unused."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: Tensor | None = None
        """(B, S) int64, column of the dense stream in each slot; −1 where unused."""
        self.length = 0
        """Tokens of a row so far, kept or not."""
        self.ragged = False
        """Whether any slot may be unused."""
        self.routed = False
        """Whether image tokens were chosen among already."""
        self.last_kind: Tensor | None = None
        """(B,) on the host: what the last token of each row is, if the last forward had pictures."""

    def announce(self, columns: Tensor, tokens: int, ragged: bool) -> Tensor:
        """Say which tokens the next `update` brings.

        Args:
            columns: (B, K), as `columns`.
            tokens: by how many tokens the dense stream grows.
            ragged: whether any of `columns` may be −1.
        Returns:
            (B, S + K): columns of all slots after the update.
        """
        self.length += tokens
        self.ragged |= ragged
        self.columns = columns if self.columns is None else torch.cat((self.columns, columns), dim=1)
        return self.columns

    @property
    def slots(self) -> int:
        """S, of keys and values that are really there."""
        return 0 if not self.is_initialized or self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        super().reset()
        self.columns, self.length, self.ragged, self.routed = None, 0, False, False
        self.last_kind = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.slots:
            super().reorder_cache(beam_idx)
        if self.columns is not None:
            self.columns = self.columns.index_select(0, beam_idx.to(self.columns.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.slots:
            super().batch_repeat_interleave(repeats)
        if self.columns is not None:
            self.columns = self.columns.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.slots:
            super().batch_select_indices(indices)
        if self.columns is not None:
            self.columns = self.columns[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the dense stream, whether this layer kept them or not."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to forget")
        if not tokens_to_remove or not self.length:
            return
        self.length = max(0, self.length + tokens_to_remove)
        if self.columns is None or self.keys is None or self.values is None or not self.slots:
            return
        columns = torch.where(self.columns < self.length, self.columns, -1)
        used = (columns >= 0).any(0).nonzero()  # one copy to the host: how much memory can go
        left = int(used[-1]) + 1 if used.numel() else 0
        self.columns = columns[:, :left]
        self.ragged = True
        self.keys, self.values = self.keys[..., :left, :], self.values[..., :left, :]


def routed_layer(cache: Any, index: int) -> RoutedLayer:
    """The cache's layer `index`, made a `RoutedLayer` at its first use.

    Raises:
        UserError: a cache that cannot hold fewer tokens in one layer than in another.
    """
    name = type(cache).__name__
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UserError(f"past_key_values: a {name} cannot hold layers of different length; use a DynamicCache")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, RoutedLayer):
        return layer
    if type(layer) is not DynamicLayer:
        raise UserError(
            f"past_key_values: layer {index} of the {name} is a {type(layer).__name__}; a routed layer holds the kept "
            "tokens alone and grows as they come, which only DynamicCache allows (generate without "
            "cache_implementation); static, quantised and sliding-window layers would hold or count other tokens"
        )
    new = RoutedLayer()
    if layer.keys is not None and layer.values is not None and layer.get_seq_length():
        # filled by the dense model: every token is there
        new.lazy_initialization(layer.keys, layer.values)
        new.keys, new.values = layer.keys, layer.values
        rows, length = layer.keys.shape[0], layer.get_seq_length()
        new.announce(torch.arange(length, device=layer.keys.device).repeat(rows, 1), length, False)
    cache.layers[index] = new
    return new


def slot_mask(mask: Any, queries: Tensor, slots: Tensor, start: int, ragged: bool) -> Any:
    """The mask between the queries and the slots of a routed layer.

    Args:
        mask: the dense one, of `start` + T columns: (B or 1, 1, T, C) bool or additive, (B, C) of valid keys for
            flash attention, or None where plain causality is all.
        queries: (B, K) columns of the dense stream, −1 where unused.
        slots: (B, S) likewise, the queries' own at the end.
        start: columns before the first query that the dense mask has a row for.
        ragged: whether any column may be −1.
    Returns:
        Of the same kind: (B, 1, K, S), (B, S) or None. An unused query sees itself, so that no row is empty.
    Raises:
        UserError: a mask of another kind (flex attention).
    """
    if mask is None and not ragged:
        return None
    used = slots >= 0
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.gather(1, slots.clamp(min=0)) * used.to(mask.dtype)
    if mask is None:
        seen = (slots[:, None, :] <= queries[:, :, None])[:, None]
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        rows, wanted, width = slots.shape[0], queries.shape[1], mask.shape[-1]
        row = (queries - start).clamp(min=0)[:, None, :, None].expand(rows, mask.shape[1], wanted, width)
        seen = mask.expand(rows, -1, -1, -1).gather(2, row)
        column = slots.clamp(min=0)[:, None, None, :].expand(rows, mask.shape[1], wanted, slots.shape[1])
        seen = seen.gather(3, column)
    else:
        raise UserError(
            f"attention_mask: a {type(mask).__name__} cannot be narrowed to the kept tokens; load the model with "
            "attn_implementation sdpa, eager or flash_attention_2"
        )
    if not ragged:
        return seen
    visible = used[:, None, None, :]
    if seen.dtype != torch.bool:
        lowest = torch.finfo(seen.dtype).min
        seen = seen.masked_fill(~visible, lowest)
    else:
        seen = seen & visible
    own = torch.eye(queries.shape[1], dtype=torch.bool, device=seen.device)
    own = torch.nn.functional.pad(own, (slots.shape[1] - queries.shape[1], 0)) & (queries < 0)[:, None, :, None]
    return seen | own if seen.dtype == torch.bool else seen.masked_fill(own, 0.0)


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """What a cache holds, and what the dense model's would."""

    bytes: int
    dense_bytes: int
    slots: tuple[int, ...]
    """Tokens a row that each layer holds, unused slots included."""
    dense_slots: tuple[int, ...]

    @property
    def saved(self) -> float:
        """Share of the dense model's memory."""
        return 1 - self.bytes / self.dense_bytes if self.dense_bytes else 0.0


def cache_report(cache: Cache) -> CacheReport:
    """Bytes of keys and values, as allocated, and the bytes of a dense cache of the same batch and length."""
    held, dense, slots, full = 0, 0, [], []
    for layer in cache.layers:
        if not isinstance(layer, CacheLayerMixin) or not layer.is_initialized:
            continue
        keys, values = layer.keys, layer.values
        if keys is None or values is None or keys.numel() == 0:
            continue
        mine, there = keys.nbytes + values.nbytes, keys.shape[-2]
        length = layer.length if isinstance(layer, RoutedLayer) else there
        held, dense = held + mine, dense + mine // there * length
        slots.append(there)
        full.append(length)
    return CacheReport(held, dense, tuple(slots), tuple(full))
