"""One id space for all modalities: the special tokens first, then a range of ids for each modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Vocabulary:
    """Ids of a mixed-modal token stream.

    Ids 0 and 1 are `<bos>` and `<eos>`, the begin and end of a document. A pair `<begin_X>`, `<end_X>`
    follows for each modality X other than text. Then come the payload ids: a contiguous range for each
    modality, in order. All special tokens are of the modality of text, whatever its name. Padding has no id:
    it is token 0 whose modality and document are -1.

    Args:
        sizes: payload ids of each modality, at least 1; their order is the order of the modalities.
        text: name of the modality of text; default: the first.
    Raises:
        ValueError: `text` is none of the modalities, or a size is below 1.
    """

    bos = 0
    eos = 1

    def __init__(self, sizes: Mapping[str, int], text: str | None = None) -> None:
        text = next(iter(sizes), "") if text is None else text
        if text not in sizes:
            raise ValueError(f"a vocabulary of {list(sizes)} lacks {text!r}, the modality of the special tokens")
        self.sizes, self.text = dict(sizes), text
        self.modalities = tuple(self.sizes)
        self.specials = {"<bos>": self.bos, "<eos>": self.eos}
        for modality in self.modalities:
            if modality != text:
                for edge in ("begin", "end"):
                    self.specials[f"<{edge}_{modality}>"] = len(self.specials)
        self._ranges: dict[str, tuple[int, int]] = {}
        start = len(self.specials)
        for modality, size in self.sizes.items():
            if size < 1:
                raise ValueError(f"modality {modality!r} has {size} ids; a modality needs at least 1")
            self._ranges[modality] = (start, start + size)
            start += size
        self.size = start
        self._modality = np.full(self.size, self.modalities.index(text), dtype=np.int8)
        for number, modality in enumerate(self.modalities):
            first, stop = self._ranges[modality]
            self._modality[first:stop] = number

    def range(self, modality: str) -> tuple[int, int]:
        """(start, stop) of the payload ids of `modality`."""
        return self._ranges[modality]

    def begin(self, modality: str) -> int:
        """Id of `<begin_modality>`; text has none (KeyError)."""
        return self.specials[f"<begin_{modality}>"]

    def end(self, modality: str) -> int:
        """Id of `<end_modality>`; text has none (KeyError)."""
        return self.specials[f"<end_{modality}>"]

    def modality_of(self, tokens: np.ndarray) -> np.ndarray:
        """Number of the modality (in the order of `modalities`) of each token, int8, in the shape of
        `tokens`.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.size and not (0 <= tokens.min() and tokens.max() < self.size):
            raise ValueError(
                f"token ids lie in [{tokens.min()}, {tokens.max()}]; the vocabulary has [0, {self.size - 1}]"
            )
        return self._modality[tokens]

    def ids_in(self, other: Vocabulary) -> np.ndarray:
        """(size,) int64, the id in `other` that means what each id means here, −1 where none does: special tokens by
        their names, the others by their places in their modality's range."""
        result = np.full(self.size, -1, np.int64)
        for special, number in self.specials.items():
            result[number] = other.specials.get(special, -1)
        for modality, (start, stop) in self._ranges.items():
            if modality in other._ranges:
                first, end = other._ranges[modality]
                count = min(stop - start, end - first)
                result[start : start + count] = np.arange(first, first + count)
        return result

    def name(self, token: int) -> str:
        """`<eos>`, `text 17`, `image 3`: what the id `token` stands for."""
        for special, number in self.specials.items():
            if number == token:
                return special
        for modality, (start, stop) in self._ranges.items():
            if start <= token < stop:
                return f"{modality} {token - start}"
        raise ValueError(f"token {token} is outside the vocabulary of {self.size} ids")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return (*self.sizes.items(), self.text)

    def __repr__(self) -> str:
        return f"Vocabulary({self.sizes}, {self.text!r})"
