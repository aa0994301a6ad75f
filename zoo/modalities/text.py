"""Text ↔ ids: bytes, byte-pair encoding trained on the user's own text, or the tokenizer of a pretrained model."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic
import tokenizers

from zoo.carries import Ids
from zoo.config import UserError
from zoo.extras import extra
from zoo.modality import LearnedConfig, LearnedModality, Modality, ModalityConfig
from zoo.registry import register

BYTES = 256
WORD = 256
"""Characters of the longest run without (or of nothing but) white space that a tokenizer is trained on as a whole."""
LONG = re.compile(rf"\S{{{WORD + 1},}}|\s{{{WORD + 1},}}")
TOKENIZER = "tokenizer.json"
PROBE = "aЖ語"
"""Characters of which a tokenizer must make something."""
PROBES = ("A Fox jumps  over\n\n\ta Dog.", "Crème Bru\u0302le\u0301e", "ﬁne ½ Ⅷ", "日本語 🙂 Ж", "A Fox", "a  dog")
"""Texts that a tokenizer must give back; the last ones are of letters that even a small vocabulary knows."""


class TextConfig(ModalityConfig):
    """What all kinds of text share: an item is a string, and may be cut anywhere."""

    part: ClassVar[str] = "text"
    suffix: ClassVar[str] = ".txt"

    @property
    def positions(self) -> None:
        return None

    def read(self, content: bytes) -> str:
        """The string that the UTF-8 bytes spell."""
        return content.decode("utf-8")


class Text(Modality):
    """What all kinds of text share."""

    def write(self, item: str) -> bytes:
        return item.encode("utf-8")


@register("modality", "bytes")
class Bytes(Text):
    """Ids 0..255 are the bytes of the UTF-8 text."""

    class Config(TextConfig):
        """Each UTF-8 byte is a token; nothing to learn."""

        @property
        def carries(self) -> Ids:
            return Ids(BYTES)

    def encode(self, item: str) -> np.ndarray:
        """(n,) int32 ids of a text without lone surrogates, counted from 0."""
        return np.frombuffer(item.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, content: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        return bytes(int(i) for i in content).decode("utf-8", errors="replace")


def _pieces(text: str) -> Iterator[str]:
    """A text in pieces without a word longer than WORD characters: training takes a word's length squared."""
    start = 0
    for run in LONG.finditer(text):
        for cut in range(run.start() + WORD, run.end(), WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def _steady(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer without what makes it give other ids each time, fewer, or more than a text has."""
    content = json.loads(inner.to_str())
    sampling = [key for key in ("dropout", "alpha", "nbest_size") if content["model"].get(key) is not None]
    if not sampling and content["truncation"] is None and content["padding"] is None:
        return inner
    for key in sampling:
        del content["model"][key]
    return tokenizers.Tokenizer.from_str(json.dumps(content | {"truncation": None, "padding": None}))


class Tokenized(Text):
    """What kinds of text share whose ids a tokenizer of the `tokenizers` library makes.

    Args:
        inner: the library's tokenizer, whose ids lie below config.vocab_size.
    """

    def __init__(self, config: BPE.Config | HuggingFace.Config, inner: tokenizers.Tokenizer) -> None:
        super().__init__(config)
        self.inner = inner
        self._fingerprint = hashlib.sha256(f"{config.vocab_size} {inner.to_str()}".encode()).hexdigest()

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def encode(self, item: str) -> np.ndarray:
        """(n,) int32 ids of a text without lone surrogates, counted from 0."""
        # A batch of one: it computes no offsets and, unlike `encode`, lets other threads run meanwhile.
        return np.asarray(self.inner.encode_batch_fast([item], add_special_tokens=False)[0].ids, dtype=np.int32)

    def decode(self, content: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, ids that training left unused become nothing."""
        return self.inner.decode([int(i) for i in content], skip_special_tokens=False)


def _check_kept(inner: tokenizers.Tokenizer, path: str | Path) -> None:
    """Raise `UserError` where a tokenizer alters texts: makes letters small, drops accents or white space. How Unicode
    composes its letters may change, white space in front may come or go, and what it does not know may be named so."""
    unknown = getattr(inner.model, "unk_token", None)
    unknown = None if unknown is None else inner.token_to_id(unknown)
    added = [f"a {token.content} b" for token in inner.get_added_tokens_decoder().values()]
    for text in (*PROBES, *added):
        ids = inner.encode(text, add_special_tokens=False).ids
        back = inner.decode(ids, skip_special_tokens=False)
        if unknown not in ids and _plain(back) != _plain(text):
            raise UserError(
                f"{path} alters texts: {text!r} becomes {back!r}; use another tokenizer, or accept it by lossy: true"
            )


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).lstrip(" ")


def _check_ids(inner: tokenizers.Tokenizer, vocab_size: int, path: str | Path) -> None:
    """Raise `UserError` where a tokenizer has more ids than `vocab_size`, or makes nothing of some characters."""
    highest = max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest >= vocab_size:
        raise UserError(
            f"{path} uses ids up to {highest}, but vocab_size is {vocab_size}; set vocab_size to {highest + 1}"
        )
    lost = [character for character in PROBE if not len(inner.encode(character, add_special_tokens=False).ids)]
    if lost:
        raise UserError(
            f"{path} drops characters that it does not know, such as {''.join(lost)!r}; use a byte-level one, or one "
            "with byte_fallback or an unk_token"
        )


@register("modality", "bpe")
class BPE(Tokenized, LearnedModality):
    """Byte-level byte-pair encoding: a tokenizer of the `tokenizers` library, ids counted from 0."""

    class Config(TextConfig, LearnedConfig):
        """Byte-level byte-pair encoding: any text round-trips, frequent strings are one token.

        `path` is a `tokenizer.json` of the Hugging Face `tokenizers` library.
        """

        file: ClassVar[str] = ".json"
        fit_limit: ClassVar[int] = 1 << 26
        vocab_size: int = pydantic.Field(default=4096, ge=BYTES)
        """Ids, at least 256; training on little text may use fewer of them."""
        lossy: bool = False
        """Accept a tokenizer that does not give every text back: one that makes letters small, or drops accents."""

        @property
        def carries(self) -> Ids:
            return Ids(self.vocab_size)

        def extent(self, item: str) -> int:
            """Characters of the text."""
            return len(item)

        def fit(self, items: Iterable[str]) -> BPE:
            inner = tokenizers.Tokenizer(tokenizers.models.BPE())
            inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
            inner.decoder = tokenizers.decoders.ByteLevel()
            trainer = tokenizers.trainers.BpeTrainer(
                vocab_size=self.vocab_size,
                initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                show_progress=sys.stderr.isatty(),
            )
            inner.train_from_iterator((piece for item in items for piece in _pieces(item)), trainer)
            return BPE(self, inner)

        def load(self, path: str | Path) -> BPE:
            """Read a `tokenizer.json`.

            Raises:
                UserError: the file is missing or no tokenizer, loses characters of a text, or holds more ids than
                    `vocab_size`.
            """
            if not Path(path).is_file():
                raise UserError(f"text tokenizer {path} does not exist; correct `path`, or set it to null to train one")
            try:
                inner = _steady(tokenizers.Tokenizer.from_file(str(path)))
            except Exception as error:  # the library raises bare Exception for whatever is wrong with the file
                raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {error}") from None
            _check_ids(inner, self.vocab_size, path)
            if not self.lossy:
                _check_kept(inner, path)
            return BPE(self, inner)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as a `tokenizer.json`."""
        Path(path).write_text(self.inner.to_str(pretty=True), encoding="utf-8")


@register("modality", "huggingface")
class HuggingFace(Tokenized):
    """The tokenizer of a Hugging Face model, without its special tokens: the stream has its own.

    Raises:
        UserError: the folder is missing or holds no tokenizer, or the tokenizer does not fit the config.
    """

    class Config(TextConfig):
        """A tokenizer of a pretrained model, from a local folder.

        `path` holds a `tokenizer.json`, or whatever else Transformers makes a fast tokenizer of. Names of its special
        tokens that stand in a text, such as `</s>`, are plain text.
        """

        file: ClassVar[str] = ""
        path: str
        """The folder of the tokenizer."""
        vocab_size: int = pydantic.Field(ge=1)
        """Ids, at least as many as the tokenizer has; its special ones count and stay unused."""
        lossy: bool = False
        """Accept a tokenizer that does not give every text back: one that makes letters small, or drops accents."""

        @property
        def carries(self) -> Ids:
            return Ids(self.vocab_size)

    def __init__(self, config: Config) -> None:
        inner = _steady(_from_folder(Path(config.path)))
        _check_ids(inner, config.vocab_size, config.path)
        if not config.lossy:
            _check_kept(inner, config.path)
        inner.encode_special_tokens = True
        super().__init__(config, inner)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as the `tokenizer.json` of a new folder."""
        Path(path).mkdir()
        (Path(path) / TOKENIZER).write_text(self.inner.to_str(pretty=True), encoding="utf-8")


def _from_folder(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a folder as Transformers saves it."""
    if not folder.is_dir():
        raise UserError(f"text tokenizer {folder} is no folder; give the folder of a model or a tokenizer")
    try:
        if (folder / TOKENIZER).is_file():
            return tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
        with extra("adapt", f"text tokenizer {folder}"):
            import transformers
        found = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except UserError:
        raise
    except Exception as error:  # the libraries raise anything for files they cannot read
        raise UserError(f"text tokenizer {folder}: cannot be read ({type(error).__name__}: {error})") from None
    inner = getattr(found, "backend_tokenizer", None)
    if not isinstance(inner, tokenizers.Tokenizer):
        raise UserError(
            f"text tokenizer {folder}: is a {type(found).__name__}, which has no fast form; save one that has"
        )
    return inner
