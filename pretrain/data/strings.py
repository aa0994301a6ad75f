"""Many strings in memory proportional to their characters, however long one of them is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Strings:
    """Strings one after the other; those of an array of fixed width all take as much as the longest."""

    content: np.ndarray
    """(bytes,) uint8: all of them in UTF-8, lone surrogates included."""
    stops: np.ndarray
    """(n,) int64: where in `content` each of them ends."""

    @classmethod
    def pack(cls, values: Iterable[str]) -> Strings:
        """The strings `values`, in their order."""
        encoded = [value.encode("utf-8", "surrogatepass") for value in values]
        stops = np.cumsum(np.array([len(value) for value in encoded], np.int64))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), stops)

    @classmethod
    def join(cls, parts: Sequence[Strings]) -> Strings:
        """The strings of all parts, in their order."""
        firsts = np.cumsum([0, *(len(part.content) for part in parts)])
        stops = [part.stops + first for part, first in zip(parts, firsts.tolist(), strict=False)]
        empty = (np.zeros(0, np.uint8), np.zeros(0, np.int64))
        return cls(np.concatenate([empty[0], *(part.content for part in parts)]), np.concatenate([empty[1], *stops]))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The strings as arrays for a file; `named` reads them."""
        return {name: self.content, f"{name}_stops": self.stops}

    @classmethod
    def named(cls, name: str, arrays: Mapping[str, np.ndarray]) -> Strings:
        """The strings that `arrays` gave under this name."""
        return cls(arrays[name], arrays[f"{name}_stops"])

    def __len__(self) -> int:
        return len(self.stops)

    def tolist(self) -> list[str]:
        """All of them."""
        content, stops = self.content.tobytes(), self.stops.tolist()
        return [content[i:j].decode("utf-8", "surrogatepass") for i, j in zip([0, *stops[:-1]], stops, strict=False)]
