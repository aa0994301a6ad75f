"""Permutations that are arithmetic: of any number of things, without holding more than the things themselves.

Number i has the key h(h(i) ⊕ s), where h is a bijection of 32-bit integers (`zoo.noise.hash32`) and s a state made from
a seed and a stream. A permutation lists the numbers by ascending key. Since keys are distinct and lead back to numbers,
it is had by sorting the keys in place, and the order of any subset by sorting the keys of that subset alone.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from zoo.noise import hash32, unhash32

MOST = 1 << 32
"""Numbers a permutation may have: keys are 32-bit integers."""
CHUNK = 1 << 20
"""Numbers that are in hand at a time."""


@dataclasses.dataclass(frozen=True)
class Shuffle:
    """A permutation of 0, 1, 2, … that depends on (seed, stream) alone, on any machine and NumPy.

    Attributes:
        state: uint32, mixed from both.
    """

    state: np.uint32

    @classmethod
    @functools.lru_cache(maxsize=64)
    def of(cls, seed: int, stream: int) -> Shuffle:
        """That of a stream, one of many that share the seed."""
        state = hash32(np.array([seed & 0xFFFFFFFF], np.uint64))
        state = hash32(state ^ hash32(np.array([seed >> 32 & 0xFFFFFFFF], np.uint64)))
        return cls(hash32(state ^ np.uint32(stream))[0])

    def keys(self, numbers: np.ndarray) -> np.ndarray:
        """(n,) uint32: by which `numbers` (n,), each below 2³², are ordered."""
        return hash32(hash32(numbers) ^ self.state)

    def numbers(self, keys: np.ndarray) -> np.ndarray:
        """(n,) uint32: the numbers that have these keys."""
        return unhash32(unhash32(keys) ^ self.state)

    def sort(self, numbers: np.ndarray) -> None:
        """Put distinct `numbers` (n,) uint32 into the order of the permutation, in place."""
        for part in chunks(len(numbers)):
            numbers[part] = self.keys(numbers[part])
        numbers.sort()
        for part in chunks(len(numbers)):
            numbers[part] = self.numbers(numbers[part])

    def sort_groups(self, numbers: np.ndarray, stops: np.ndarray) -> None:
        """The same within each of the groups that follow one another in `numbers` and end at `stops` (g,)."""
        first = 0  # of the numbers in hand
        for group in range(len(stops)):
            start = int(stops[group - 1]) if group else 0
            stop = int(stops[group])
            last = group + 1 == len(stops)
            if stop - start > CHUNK:
                self._sort_small(numbers, first, start, stops)
                self.sort(numbers[start:stop])
                first = stop
            elif last or int(stops[group + 1]) - first > CHUNK:
                self._sort_small(numbers, first, stop, stops)
                first = stop

    def _sort_small(self, numbers: np.ndarray, first: int, stop: int, stops: np.ndarray) -> None:
        """Sort the whole groups between two places, all at once."""
        group = np.searchsorted(stops, np.arange(first, stop), side="right").astype(np.uint64)
        keys = (group << np.uint64(32)) | self.keys(numbers[first:stop])
        keys.sort()
        numbers[first:stop] = self.numbers((keys & np.uint64(MOST - 1)).astype(np.uint32))


def chunks(count: int) -> list[slice]:
    """0 to `count` in stretches of at most CHUNK."""
    return [slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def shuffled(count: int, seed: int, stream: int) -> np.ndarray:
    """(count,) int64: a permutation of range(count), see `Shuffle`."""
    numbers = np.arange(count, dtype=np.uint32)
    Shuffle.of(seed, stream).sort(numbers)
    return numbers.astype(np.int64)
