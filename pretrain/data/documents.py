"""All documents of a split as one array of tokens that stays on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pretrain.data.items import Form, ShardTokens, stored
from pretrain.data.plan import cut
from zoo.modalities import Modalities, Vocabulary

CHUNK = 1 << 20
"""Tokens that are in hand at a time."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of some shards one after the other. Of a shard only three numbers are kept in memory."""

    vocabulary: Vocabulary
    shards: Sequence[ShardTokens]
    """Each is opened when it is asked for."""
    token_starts: np.ndarray
    """(shards + 1,) int64: tokens before each shard."""
    document_starts: np.ndarray
    """(shards + 1,) int64: documents before each shard."""
    forms: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    """What a position carries of each modality whose positions carry no ids."""
    bidirectional: tuple[str, ...] = ()
    """The modalities whose positions see all of their item."""
    name: str = ""
    """Hash of what the shards hold."""
    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Tokens of each modality; empty where they were not counted."""

    @classmethod
    def join(
        cls, shards: Sequence[ShardTokens], vocabulary: Vocabulary, modalities: Modalities | None = None
    ) -> Documents:
        """The documents of `shards`, in their order.

        Args:
            modalities: those of the vocabulary; default: all carry ids and see what stands before.
        """
        sizes = [(len(shard.tokens), len(shard.starts) - 1) for shard in shards]
        return cls.of(shards, np.array(sizes, np.int64).reshape(-1, 2), vocabulary, modalities or {})

    @classmethod
    def of(
        cls,
        shards: Sequence[ShardTokens],
        sizes: np.ndarray,
        vocabulary: Vocabulary,
        modalities: Modalities,
        name: str = "",
        counts: Mapping[str, int] | None = None,
    ) -> Documents:
        """The same without opening a shard: `sizes` (shards, 2) int64 are the tokens and the documents of each."""
        forms = {each: stored(modality.carries) for each, modality in modalities.items()}
        tokens, documents = np.concatenate([np.zeros((2, 1), np.int64), np.cumsum(sizes.T, axis=1)], axis=1)
        return cls(
            vocabulary,
            shards,
            tokens,
            documents,
            {each: form for each, form in forms.items() if form is not None},
            tuple(each for each, modality in modalities.items() if modality.bidirectional),
            name,
            counts or {},
        )

    def __len__(self) -> int:
        return int(self.document_starts[-1])

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return int(self.token_starts[-1])

    def place(self, token: int) -> tuple[ShardTokens, int]:
        """The shard in which a token of the whole lies, and its place there."""
        shard = int(np.searchsorted(self.token_starts, token, side="right")) - 1
        return self.shards[shard], token - int(self.token_starts[shard])

    def number(self, token: int) -> int:
        """Which document a token of the whole is in."""
        shard = int(np.searchsorted(self.token_starts, token, side="right")) - 1
        offset = token - int(self.token_starts[shard])
        inside = int(np.searchsorted(self.shards[shard].starts, offset, side="right")) - 1
        return int(self.document_starts[shard]) + inside

    def document(self, number: int) -> np.ndarray:
        """(n,) int32: the tokens of a document."""
        shard = int(np.searchsorted(self.document_starts, number, side="right")) - 1
        found, inside = self.shards[shard], number - int(self.document_starts[shard])
        return found.tokens[int(found.starts[inside]) : int(found.starts[inside + 1])]

    def bytes_in(self, start: int, length: int) -> float:
        """UTF-8 bytes of the texts in a stretch of one document; where it is not the whole document, the share of its
        text tokens."""
        shard, offset = self.place(start)
        document = int(np.searchsorted(shard.starts, offset, side="right")) - 1
        first, stop = shard.starts[document : document + 2].tolist()
        whole = float(shard.text_bytes[document])
        if length == stop - first:
            return whole
        inside, of_all = (self._text_tokens(shard.tokens[a:b]) for a, b in ((offset, offset + length), (first, stop)))
        return whole * inside / max(of_all, 1)

    def _text_tokens(self, tokens: np.ndarray) -> int:
        """Ids of text, special tokens apart."""
        own, stop = self.vocabulary.range(self.vocabulary.text)
        return int(((tokens >= own) & (tokens < stop)).sum())

    def edges(self, length: int) -> Iterator[np.ndarray]:
        """The first token of each piece of at most `length` tokens, shard by shard, and then the end of the last."""
        for number, first in enumerate(self.token_starts[:-1].tolist()):
            shard = self.shards[number]
            yield cut(np.asarray(shard.starts), shard.spans(), length) + first
        yield self.token_starts[-1:]

    def frequencies(self, length: int) -> np.ndarray:
        """(ids,) int64: how often each id occurs as a target, in pieces of at most `length` tokens: a piece's first
        token is none."""
        counts = np.zeros(self.vocabulary.size, np.int64)
        for number, edges in zip(range(len(self.shards)), self.edges(length), strict=False):
            tokens = self.shards[number].tokens
            for start in range(0, len(tokens), CHUNK):
                counts += np.bincount(tokens[start : start + CHUNK], minlength=len(counts))
            counts -= np.bincount(tokens[edges - self.token_starts[number]], minlength=len(counts))
        return counts
