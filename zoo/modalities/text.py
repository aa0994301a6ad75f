"""Text ↔ ids: plain bytes, or byte-level byte-pair encoding trained on the user's own text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pydantic
import tokenizers

from zoo.config import Config, UserError

BYTES = 256


class BytesConfig(Config):
    """Each UTF-8 byte is a token; nothing to train."""

    type: Literal["bytes"] = "bytes"

    @property
    def size(self) -> int:
        """Ids in the range of this tokenizer."""
        return BYTES

    def fit(self, texts: Iterable[str]) -> BytesTokenizer:
        """The tokenizer; `texts` are not read."""
        return BytesTokenizer()

    def load(self, path: str | Path) -> BytesTokenizer:
        """The tokenizer; no file is read."""
        return BytesTokenizer()


class BPEConfig(Config):
    """Byte-level byte-pair encoding: any text round-trips, frequent strings are one token.

    vocab_size: ids in the range of this tokenizer, at least 256; training on little text may use fewer of
        them.
    path: a `tokenizer.json` of the Hugging Face `tokenizers` library; null trains one on the training shards.
    """

    type: Literal["bpe"] = "bpe"
    vocab_size: int = pydantic.Field(default=4096, ge=BYTES)
    path: str | None = None

    @property
    def size(self) -> int:
        """Ids in the range of this tokenizer."""
        return self.vocab_size

    def fit(self, texts: Iterable[str]) -> BPETokenizer:
        """Train on `texts`. The same texts in the same order give the same tokenizer."""
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        inner.train_from_iterator(texts, trainer)
        return BPETokenizer(inner, self.vocab_size)

    def load(self, path: str | Path) -> BPETokenizer:
        """Read a `tokenizer.json`.

        Raises:
            UserError: the file is missing or no tokenizer, or holds more ids than `vocab_size`.
        """
        if not Path(path).is_file():
            raise UserError(f"text tokenizer {path} does not exist; correct `path`, or set it to null to train one")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
            raise UserError(f"{path} is no tokenizer.json of the tokenizers library: {error}") from None
        highest = max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
        if highest >= self.vocab_size:
            raise UserError(
                f"{path} uses ids up to {highest}, but vocab_size is {self.vocab_size}; set vocab_size to {highest + 1}"
            )
        return BPETokenizer(inner, self.vocab_size)


class BytesTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text."""

    size = BYTES
    fingerprint = hashlib.sha256(b"utf-8 bytes").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which has no lone surrogates, counted from 0."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class BPETokenizer:
    """A tokenizer of the `tokenizers` library behind encode and decode with ids counted from 0."""

    def __init__(self, inner: tokenizers.Tokenizer, size: int) -> None:
        self.inner = inner
        self.size = size
        self.fingerprint = hashlib.sha256(f"{size} {inner.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which has no lone surrogates, counted from 0."""
        # A batch of one: it computes no offsets and, unlike `encode`, lets other threads run meanwhile.
        return self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that training left unused become
        nothing."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        self.inner.save(str(path))


TextTokenizer = BytesTokenizer | BPETokenizer
