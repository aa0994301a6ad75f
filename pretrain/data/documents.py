"""All documents of a split as one array of tokens that stays on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.data.index import ShardTokens
from pretrain.data.items import Items, stored
from pretrain.data.strings import Strings
from zoo.modalities import Modalities, ModalityConfig, Vocabulary


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of some shards one after the other: document i is tokens starts[i] to starts[i + 1] of
    the whole."""

    vocabulary: Vocabulary
    starts: np.ndarray
    """(d + 1,) int64."""
    text_bytes: np.ndarray
    """(d,) int64, UTF-8 bytes of the texts of each document."""
    spans: np.ndarray
    """(s, 2) int64, ascending: [start, stop) of the parts that must never be cut."""
    shards: Sequence[np.ndarray]
    """The tokens, an int32 array for each shard."""
    shard_starts: np.ndarray
    """(shards + 1,) int64: first token of each shard in the whole."""
    keys: Strings
    """The key of each of the d documents."""
    items: Mapping[str, Items] = dataclasses.field(default_factory=dict)
    """The items of each modality whose positions carry no ids or see all of their item."""

    @classmethod
    def join(
        cls, shards: Sequence[ShardTokens], vocabulary: Vocabulary, modalities: Modalities | None = None
    ) -> Documents:
        """The documents of `shards`, in their order.

        Args:
            modalities: those of the vocabulary; default: all carry ids and see what stands before.
        """
        shard_starts = np.concatenate([[0], np.cumsum([len(s.tokens) for s in shards])]).astype(np.int64)
        base = list(zip(shards, shard_starts.tolist(), strict=False))
        return cls(
            vocabulary,
            np.concatenate([[0], *(s.starts[1:] + first for s, first in base)]).astype(np.int64),
            np.concatenate([np.zeros(0, np.int64), *(s.text_bytes for s in shards)]),
            np.concatenate([np.zeros((0, 2), np.int64), *(s.spans + first for s, first in base)]),
            [s.tokens for s in shards],
            shard_starts,
            Strings.join([s.keys for s in shards]),
            {
                name: _items(base, vocabulary.modalities.index(name), name, modality)
                for name, modality in (modalities or {}).items()
                if modality.bidirectional or stored(modality.carries) is not None
            },
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """(d,) tokens of each document."""
        return np.diff(self.starts)

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.starts[-1])

    def read(self, start: int, length: int) -> np.ndarray:
        """(length,) int32: tokens from `start` of the whole; they lie inside one document."""
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        offset = start - int(self.shard_starts[shard])
        return self.shards[shard][offset : offset + length]

    def bytes_in(self, start: int, length: int) -> float:
        """UTF-8 bytes of the texts in a stretch of one document; where it is not the whole document, the share of its
        text tokens."""
        document = int(np.searchsorted(self.starts, start, side="right")) - 1
        first, stop = self.starts[document : document + 2].tolist()
        whole = float(self.text_bytes[document])
        if length == stop - first:
            return whole
        inside, of_all = (self._text_tokens(*stretch) for stretch in ((start, length), (first, stop - first)))
        return whole * inside / max(of_all, 1)

    def _text_tokens(self, start: int, length: int) -> int:
        """Ids of text in a stretch, special tokens apart."""
        tokens = self.read(start, length)
        own, stop = self.vocabulary.range(self.vocabulary.text)
        return int(((tokens >= own) & (tokens < stop)).sum())

    def take(self, positions: np.ndarray) -> np.ndarray:
        """(n,) int32: the tokens at ascending `positions` (n,) of the whole."""
        cuts = np.searchsorted(positions, self.shard_starts)
        runs = [
            tokens[positions[first:stop] - start]
            for tokens, start, first, stop in zip(self.shards, self.shard_starts[:-1], cuts[:-1], cuts[1:], strict=True)
        ]
        return np.concatenate([np.zeros(0, np.int32), *runs])


def _items(shards: Sequence[tuple[ShardTokens, int]], number: int, name: str, modality: ModalityConfig) -> Items:
    """The items of a modality in `shards`, each with its first token in the whole."""
    spans = [np.zeros((0, 2), np.int64)]
    for shard, first in shards:
        spans.append(shard.spans[shard.modality == number] + first + np.array([1, -1]))  # between the markers
    content = [] if stored(modality.carries) is None else [shard.content[name] for shard, _ in shards]
    return Items(np.concatenate(spans), modality.bidirectional, content)
