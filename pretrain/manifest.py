"""The manifest of a folder of files: sizes and checksums of all of them, what the folder is, and a checksum of its own.

Whatever happens to a file after it was written, a bit that flips or a disk that loses its end, is found before anything
in the folder is believed. Checksums are CRC-32: against accidents, not against an adversary.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zoo.files import atomic_write, checksum

MANIFEST = "manifest.json"


class DamageError(Exception):
    """What is wrong with a folder, in words that follow its name."""


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """What a file must be."""

    bytes: int
    crc32: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder must be.

    Attributes:
        about: plain values that say what the folder is.
        files: by path below the folder.
    """

    about: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    @property
    def crc32(self) -> int:
        """Checksum of all that the manifest says; it identifies the folder's content."""
        return zlib.crc32(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())

    def check_sizes(self, folder: Path) -> None:
        """Raise DamageError where a file is missing or has another size."""
        for name, entry in self.files.items():
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                raise DamageError(f"{name} cannot be read ({error.strerror})") from None
            if size != entry.bytes:
                raise DamageError(f"{name} has {size} bytes, its manifest says {entry.bytes}")

    def check_contents(self, folder: Path, rank: int = 0, world: int = 1) -> None:
        """Read every `world`-th file, from the one of number `rank` on; raise DamageError where one is not what it
        was."""
        for name in sorted(self.files)[rank::world]:
            try:
                found = checksum(folder / name)
            except OSError as error:
                raise DamageError(f"{name} cannot be read ({error.strerror})") from None
            if found != self.files[name].crc32:
                raise DamageError(f"{name} does not have the checksum of its manifest")


def write_manifest(folder: Path, about: Mapping[str, Any], checksums: Mapping[str, int]) -> None:
    """Seal `folder`: write its manifest, once all else in it is on the disk.

    Args:
        about: plain values that say what the folder is.
        checksums: of each file, by its path below `folder`.
    """
    files = {name: FileEntry((folder / name).stat().st_size, crc) for name, crc in checksums.items()}
    manifest = Manifest(about, files)
    atomic_write(
        folder / MANIFEST, json.dumps({"crc32": manifest.crc32, **dataclasses.asdict(manifest)}, indent=1) + "\n"
    )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`.

    Raises:
        DamageError: it is missing, or not as it was written.
    """
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise DamageError(f"its {MANIFEST} cannot be read ({error.strerror})") from None
    if not content:
        raise DamageError(f"its {MANIFEST} is empty")
    try:
        data = json.loads(content)
        files = {name: FileEntry(entry["bytes"], entry["crc32"]) for name, entry in data["files"].items()}
        manifest, said = Manifest(data["about"], files), data["crc32"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamageError(f"its {MANIFEST} is not one that this library writes") from None
    if said != manifest.crc32:
        raise DamageError(f"its {MANIFEST} does not have its own checksum")
    return manifest
