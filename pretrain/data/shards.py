"""Tar shards on disk: finding them, and listing the documents in them with byte offsets.

A document is `KEY.json`; what else is called `KEY.…` belongs to it. Keys may hold dots: `report.json` and
`report.v2.json` are two documents, and `report.v2.0.png` belongs to the second.
"""

from __future__ import annotations

import dataclasses
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.data.errors import DataError
from pretrain.data.tar import TarFile, list_tar

DOCUMENT = ".json"
DOTS = 32
"""A file's name has at most so many dots after its document's key."""


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One file of a document."""

    extension: str
    """What follows the key and a dot in the member's name: "json", "0.jpg"."""
    offset: int
    """First byte of the content inside the shard."""
    size: int
    """Bytes; `UNREADABLE` where the content does not lie in the shard as one run of bytes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A document as it lies in a shard."""

    key: str
    members: tuple[Member, ...]

    def find(self, extension: str) -> Member | None:
        """The last member with this extension, else the last that differs from it only in capitals, or in how Unicode
        composes its letters: macOS writes an "é" in file names as two characters."""
        same = [m for m in self.members if m.extension == extension]
        same = same or [m for m in self.members if _folded(m.extension) == _folded(extension)]
        return same[-1] if same else None


def _folded(name: str) -> str:
    return _composed(name).lower()


def find_shards(folder: Path, pattern: str, key: str) -> list[Path]:
    """Shards in `folder` whose names match `pattern`, sorted by name; where it ends in .tar, also those that are
    compressed, .tar.gz, unless the plain file is there.

    Raises:
        DataError: the folder is missing, or nothing matches; `key` names the entry of the recipe to correct.
    """
    if not folder.is_dir():
        raise DataError(f"data.path: {str(folder)!r} is not a folder (looked for from {Path.cwd()}); correct data.path")
    shards = sorted(path for path in folder.glob(pattern) if path.is_file())
    if pattern.endswith(".tar"):
        packed = (
            path for path in folder.glob(pattern + ".gz") if path.is_file() and path.with_suffix("") not in shards
        )
        shards = sorted([*shards, *packed])
    if not shards:
        present = sorted(path.name for path in folder.glob("*.tar"))
        there = (
            f"it holds {', '.join(present[:5])}{', …' if len(present) > 5 else ''}"
            if present
            else "it holds no .tar file"
        )
        raise DataError(f"{key}: no shard in {str(folder)!r} matches {pattern!r}; {there}")
    return shards


def scan_shard(path: Path, name: str | None = None, endings: Sequence[str] = (DOCUMENT,)) -> list[Entry]:
    """The documents of a shard, in the order in which they begin.

    Files without an extension belong to no document, nor do those that macOS hides (`._…`). Files that belong to no
    `.json` are documents too, up to the first dot of their name, so that somebody counts them.

    Args:
        name: what messages call it; default: its path.
        endings: of the files that a document is known by, in lower case.
    Raises:
        DataError: the shard is empty, truncated, damaged or no tar file; names the file and the byte.
    """
    entries = _documents(list_tar(path, name), endings)
    if not entries:
        raise DataError(f"{name or path}: the shard holds no document; write it again or remove it")
    return entries


def checksum(path: Path) -> str:
    """sha256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _documents(files: Sequence[TarFile], endings: Sequence[str]) -> list[Entry]:
    """Files as documents. Where a name comes again, another document of the same key begins."""
    named = [key for key in (_main(file.name, endings) for file in files) if key is not None]
    keys = {_composed(key): key for key in named} | {key: key for key in named}
    documents: list[tuple[str, list[Member]]] = []
    newest: dict[str, tuple[list[Member], set[str]]] = {}
    for file in files:
        key = _main(file.name, endings)
        if key is not None:
            extension = file.name[len(key) + 1 :].lower()
        else:
            key, extension = _owner(file.name, keys)
        if key is None:
            continue
        if key not in newest or extension in newest[key][1]:
            newest[key] = [], set()
            documents.append((key, newest[key][0]))
        members, extensions = newest[key]
        members.append(Member(extension, file.offset, file.size))
        extensions.add(extension)
    return [Entry(key, tuple(members)) for key, members in documents]


def _main(name: str, endings: Sequence[str]) -> str | None:
    """The key of the document that a file is known by, None for any other file."""
    if name[name.rfind("/") + 1 :].startswith("._"):
        return None
    return next((name[: -len(ending)] for ending in endings if name[-len(ending) :].lower() == ending), None)


def _owner(name: str, keys: Mapping[str, str]) -> tuple[str | None, str]:
    """The key of the document that a file belongs to, the longest of `keys` that its name begins with, and what follows
    it; None where there is no document.

    Args:
        keys: by how they are spelled in a file's name.
    """
    folder = name.rfind("/") + 1
    cut = len(name)
    for _ in range(DOTS):
        cut = name.rfind(".", folder, cut)
        if cut < 0:
            break
        key = keys.get(name[:cut]) or keys.get(_composed(name[:cut]))
        if key is not None:
            return key, name[cut + 1 :]
    first = name.find(".", folder)
    return (name[:first], name[first + 1 :]) if first > folder else (None, "")


def _composed(name: str) -> str:
    """A name in the one way of Unicode to compose its letters."""
    return unicodedata.normalize("NFC", name)
