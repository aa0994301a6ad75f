"""The plan of a stream: into which pieces documents are cut, and which pieces share a row.

Everything here is an array of 4 bytes a piece, written once and then only read: in memory where there is little, in
files that all processes of a machine map where there is much. So a rank holds next to nothing of its own, whatever the
number of documents, and what is computed is computed once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import numpy as np

from pretrain.data.cache import room_for
from pretrain.data.errors import DataError
from pretrain.data.shuffle import MOST, Shuffle, chunks
from zoo.files import atomic_path, remove_leftovers

IN_MEMORY = 1 << 17
"""So many pieces are planned anew at each start, in less than a second; a plan of more is kept in files."""
EPOCHS = 4
"""Files of epochs that are kept: the newest."""

Edges = Callable[[], Iterator[np.ndarray]]
"""Gives the first token of each piece, shard by shard, ascending, and at last an array of the end."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Stretches of documents that are packed whole, one after the other: each ends where the next begins.

    Attributes:
        low: (n + 1,) uint32, the first token of each and the end of the last, modulo 2³².
        wraps: (w,) ascending: pieces at which a further 2³² tokens have been counted.
    """

    low: np.ndarray
    wraps: np.ndarray

    def __len__(self) -> int:
        return len(self.low) - 1

    def starts(self, numbers: np.ndarray | slice) -> np.ndarray:
        """(k,) int64: the first token of some pieces, counted over all shards."""
        which = np.arange(len(self.low))[numbers] if isinstance(numbers, slice) else numbers
        high = np.searchsorted(self.wraps, which, side="right").astype(np.int64)
        return self.low[which] + (high << 32)

    def lengths(self, numbers: np.ndarray | slice) -> np.ndarray:
        """(k,) uint32: tokens of some pieces, each in [1, T]."""
        if isinstance(numbers, slice):
            return np.diff(self.low[numbers.start : numbers.stop + 1])  # modulo 2³², like the places
        return self.low[numbers + 1] - self.low[numbers]


@dataclasses.dataclass(frozen=True)
class Deal:
    """How the pieces lie in one epoch."""

    pieces: np.ndarray
    """(n,) uint32: the piece in each place; places are sorted by length."""
    rows: np.ndarray | None
    """(rows,) uint32: the row of the plan that each row of the epoch is; None where they are the same."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which lengths share a row, the same in every epoch; `deal` says which pieces of these lengths.

    A place is where a piece lies in a row. Places are numbered by the length that fits, as are pieces by theirs.
    """

    pieces: Pieces
    places: np.ndarray
    """(n,) uint32: the pieces sorted by length, in order within each: those of an epoch that is not shuffled."""
    stops: np.ndarray
    """(T + 1,) int64: where in `places` the pieces of each length, from 0 to T, end."""
    slots: np.ndarray
    """(n,) uint32: the places of each row, row by row."""
    row_starts: np.ndarray
    """(rows + 1,) uint32: where in `slots` each row begins."""
    seed: int | None
    """The seed of the order; None: documents in their order, the same in each epoch."""
    folder: Path | None = None
    """Where it lies; None: in memory."""

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def pieces_of_row(self, epoch: int, row: int, deal: Deal) -> np.ndarray:
        """Numbers of the pieces in a row of an epoch, in their order."""
        template = row if deal.rows is None else int(deal.rows[row])
        pieces = deal.pieces[self.slots[int(self.row_starts[template]) : int(self.row_starts[template + 1])]]
        if self.seed is None:
            return np.sort(pieces)
        return pieces[np.argsort(Shuffle.of(self.seed, 3 * epoch + 3).keys(pieces))]

    def deal(self, epoch: int) -> Deal:
        """The pieces of an epoch: those of each length at random in the places of that length, the rows at random.

        One process of a machine deals, the others wait for it; a plan in memory is dealt in memory.

        Raises:
            DataError: the disk is full.
        """
        if self.seed is None:
            return Deal(self.places, None)
        if self.folder is None:
            return self._dealt(self.seed, epoch, _memory)
        path = self.folder / f"epoch-{epoch}"
        with filelock.FileLock(self.folder / "lock"), room_for(self.folder.parent):
            if not path.exists():
                remove_leftovers(self.folder)
                for old in sorted(self.folder.glob("epoch-*"), key=lambda file: file.stat().st_mtime)[: 1 - EPOCHS]:
                    old.unlink()  # whoever has mapped it keeps it
                with atomic_path(path) as temporary:
                    self._dealt(self.seed, epoch, functools.partial(_file, temporary))
        both = _read(path, len(self.places) + len(self))
        return Deal(both[: len(self.places)], both[len(self.places) :])

    def _dealt(self, seed: int, epoch: int, allocate: Allocate) -> Deal:
        both = allocate(len(self.places) + len(self))
        pieces, rows = both[: len(self.places)], both[len(self.places) :]
        pieces[:] = self.places
        Shuffle.of(seed, 3 * epoch + 1).sort_groups(pieces, self.stops)
        by_row = np.arange(len(rows), dtype=np.uint32)
        Shuffle.of(seed, 3 * epoch + 2).sort(by_row)  # the row of the epoch that each row of the plan becomes
        rows[by_row] = np.arange(len(rows), dtype=np.uint32)
        return Deal(pieces, rows)


Allocate = Callable[[int], np.ndarray]
"""Gives room for so many uint32."""


def _memory(count: int) -> np.ndarray:
    return np.empty(count, np.uint32)


def _file(path: Path, count: int) -> np.ndarray:
    """Room in a new file. All of it is taken now, so that a full disk is an error: a process that writes a page of a
    map for which there is no room gets SIGBUS."""
    if not count:
        return _memory(0)
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, 4 * count)
        else:
            file.truncate(4 * count)
    return np.memmap(path, np.uint32, "r+", shape=(count,))


def _read(path: Path, count: int) -> np.ndarray:
    """A file of so many uint32, mapped; as a plain array, whose slices cost less than those of np.memmap."""
    return np.memmap(path, np.uint32, "r", shape=(count,)).view(np.ndarray)


# --------------------------------------------------------------------------------------------------------- making one


def plan_rows(edges: Edges, length: int, seed: int | None, cache: Path | None, name: str) -> Plan:
    """The plan of pieces in rows of T tokens.

    Args:
        edges: of the pieces, asked for twice where no plan is there.
        length: T.
        cache: folder for what is computed once a machine; None keeps it in memory, however much it is. Its lock is
            held by the caller.
        name: of the plan in `cache`; equal names mean equal plans.
    Raises:
        DataError: more pieces than can be numbered.
    """
    folder = None if cache is None else cache / f"{name}.plan"
    plan = None if folder is None else _mapped(folder, seed)
    if plan is not None:
        return plan
    count = sum(map(len, edges())) - 1
    if count >= MOST:
        raise DataError(
            f"data: {count:,} pieces of documents; a source may have {MOST - 1:,}: divide it into several sources"
        )
    if folder is None or count <= IN_MEMORY:
        return _made(edges, count, length, seed, lambda _, number: _memory(number))
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        made = _made(edges, count, length, seed, lambda what, number: _file(temporary / what, number))
        np.save(temporary / "stops.npy", made.stops)
        np.save(temporary / "wraps.npy", made.pieces.wraps)
        (temporary / "scratch").unlink()
        (temporary / "plan.json").write_text(json.dumps({"pieces": count, "rows": len(made)}))
    plan = _mapped(folder, seed)
    assert plan is not None, "it has just been made"
    return plan


def _mapped(folder: Path, seed: int | None) -> Plan | None:
    """The plan that lies in a folder, or None where there is none that is whole."""
    try:
        about = json.loads((folder / "plan.json").read_text())
        count, rows = about["pieces"], about["rows"]
        sizes = {"pieces": count + 1, "places": count, "slots": count, "row_starts": rows + 1}
        if any((folder / what).stat().st_size != 4 * size for what, size in sizes.items()):
            return None
        arrays = {what: _read(folder / what, size) for what, size in sizes.items()}
        wraps, stops = np.load(folder / "wraps.npy"), np.load(folder / "stops.npy")
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    pieces = Pieces(arrays["pieces"], wraps)
    return Plan(pieces, arrays["places"], stops, arrays["slots"], arrays["row_starts"], seed, folder)


def _made(edges: Edges, count: int, length: int, seed: int | None, room: Callable[[str, int], np.ndarray]) -> Plan:
    """The plan in arrays that `room` gives by name and number of uint32."""
    pieces = _pieces(edges, room("pieces", count + 1))
    places, slots = room("places", count), room("slots", count)
    scratch = room("scratch", 3 * count)
    place_of, order, rows = (scratch[k * count : (k + 1) * count] for k in range(3))
    sizes = np.zeros(length + 1, np.int64)
    for part in chunks(count):
        sizes += np.bincount(pieces.lengths(part), minlength=length + 1)
    stops = np.cumsum(sizes)
    free = stops - sizes
    for part in chunks(count):
        place_of[part] = _take_places(free, pieces.lengths(part))
        places[place_of[part]] = np.arange(part.start, part.stop)
        order[part] = np.arange(part.start, part.stop)
    if seed is not None:
        Shuffle.of(seed, 0).sort(order)
    filling = BestFit(length)
    for part in chunks(count):
        rows[part] = filling.place(pieces.lengths(order[part]))
    starts = room("row_starts", filling.rows + 1)
    starts[:] = 0
    for part in chunks(count):
        starts[1:] += np.bincount(rows[part], minlength=filling.rows).astype(np.uint32)
    np.cumsum(starts, out=starts)
    free = starts[:-1].copy()
    for part in chunks(count):
        slots[_take_places(free, rows[part])] = place_of[order[part]]
    return Plan(pieces, places, stops, slots, starts, seed)


def _pieces(edges: Edges, low: np.ndarray) -> Pieces:
    stop, last, wraps = 0, 0, []
    for part in edges():
        low[stop : stop + len(part)] = part & (MOST - 1)
        high = part >> 32
        wraps.append(np.repeat(np.arange(stop, stop + len(part)), np.diff(high, prepend=last)))
        if len(part):
            last = int(high[-1])
        stop += len(part)
    assert stop == len(low)
    return Pieces(low, np.concatenate(wraps))


def _take_places(free: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(n,) for each of n members, in order, the next free place of its group; `free` (g,) moves on."""
    order = np.argsort(groups, kind="stable")
    groups = groups[order]
    first = np.flatnonzero(np.diff(groups, prepend=groups[:1] - 1)) if len(groups) else np.zeros(0, np.int64)
    sizes = np.diff(first, append=len(groups))
    taken = np.empty(len(groups), np.int64)
    taken[order] = free[groups] + np.arange(len(groups)) - np.repeat(first, sizes)
    free[groups[first]] += sizes.astype(free.dtype)
    return taken


def cut(starts: np.ndarray, spans: np.ndarray, length: int) -> np.ndarray:
    """(n,) the first token of each piece of at most T tokens, ascending.

    Args:
        starts: (d + 1,) first token of each document, and the end of the last.
        spans: (s, 2) [start, stop) that no cut may enter, ascending, none longer than T.
        length: T.
    """
    first, stop = starts[:-1], starts[1:]
    begins, ends = np.ascontiguousarray(spans.T)
    edges = [first]
    while True:
        long = stop - first > length
        first, stop = first[long] + length, stop[long]
        if not len(first):
            break
        if len(spans):
            span = np.searchsorted(begins, first, side="left") - 1  # the last that begins before the cut
            first = np.where((span >= 0) & (ends[span] > first), begins[span], first)
        edges.append(first)
    return np.sort(np.concatenate(edges)) if len(edges) > 1 else edges[0]


class BestFit:
    """Best fit: a piece goes to the fullest row that has room for it, else to a new one.

    Args:
        length: T, places of a row.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.rows = 0
        """How many rows have been begun."""
        self.with_room = [array("I") for _ in range(length + 1)]  # free places → rows
        self.occupied = 0  # bit r is set where with_room[r] holds a row: the fullest row that fits is bit arithmetic

    def place(self, lengths: np.ndarray) -> list[int]:
        """The row of each of the next pieces, of `lengths` (n,) in [1, T]."""
        rows, with_room, occupied, count = [], self.with_room, self.occupied, self.rows
        for length in lengths.tolist():
            fitting = occupied >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = with_room[room].pop()
                if not with_room[room]:
                    occupied ^= 1 << room
            else:
                room, row = self.length, count
                count += 1
            rows.append(row)
            room -= length
            if room:
                with_room[room].append(row)
                occupied |= 1 << room
        self.occupied, self.rows = occupied, count
        return rows
