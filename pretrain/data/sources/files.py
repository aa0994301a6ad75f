"""Where a source's files lie, and how each becomes a file on this machine.

A path is local, a URL that fsspec opens (`https://`, `s3://`, `hf://`, …), or `pipe:COMMAND`, whose output is the file.
Braces stand for several, `shard-{000..123}.tar`; `*` and `**` for whatever is there.
"""

from __future__ import annotations

import bz2
import dataclasses
import errno
import glob
import gzip
import hashlib
import lzma
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import braceexpand
import fsspec
from fsspec.callbacks import TqdmCallback

from pretrain.data.errors import DataError, shown
from zoo.files import atomic_path

PIPE = "pipe:"
COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""First bytes of a compressed file, and what reads it."""
TRIES = 3
"""How often a URL is asked before it counts as unreachable."""
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class Shard:
    """A piece of a source that is read, and turned into tokens, on its own: a file, or some files of a folder."""

    url: str
    """Local path, URL or `pipe:COMMAND` of the file, or the folder of the files."""
    files: tuple[str, ...] = ()
    """The files inside the folder, as paths below it; empty where the shard is a file."""

    @property
    def remote(self) -> bool:
        """It does not lie on this machine."""
        return is_remote(self.url)

    @property
    def name(self) -> str:
        """The name of its file, of the first of its files, or the pipe's command."""
        if self.url.startswith(PIPE):
            return self.url
        return self.files[0] if self.files else PurePosixPath(self.url.split("?")[0]).name

    @property
    def place(self) -> str:
        """Its address, with the folder that the command ran in."""
        return "\0".join([self.url if self.remote else str(Path(self.url).resolve()), *self.files])

    @property
    def stamp(self) -> str:
        """A text that changes when one of its files does, made without reading them. A remote file is taken to be what
        it was when it was read."""
        if self.remote:
            return "remote"
        paths = [Path(self.url, file) for file in self.files or ("",)]
        numbers = [[status.st_size, status.st_mtime_ns] for status in (path.stat() for path in paths)]
        return hashlib.sha256(repr(numbers).encode()).hexdigest()

    def local(self, cache: Path) -> Path:
        """The file on this machine. One that is remote or compressed is read once, from its beginning to its end, into
        an uncompressed copy in `cache`, which stays there until `release`.

        Raises:
            DataError: it cannot be read, or ends too early.
            OSError: it does not fit on the disk; see `room_for`.
        """
        if not self.remote and _compression(Path(self.url)) is None:
            return Path(self.url)
        copy = self._copy(cache)
        if not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            with atomic_path(copy) as temporary:
                if not self.remote:
                    self._uncompress(Path(self.url), temporary)
                else:
                    fetched = temporary.with_suffix(".fetched.0.writing")
                    try:
                        self._fetch(fetched)
                        self._uncompress(fetched, temporary)
                    finally:
                        fetched.unlink(missing_ok=True)
        return copy

    def release(self, cache: Path) -> None:
        """Remove the copy that `local` made, if it made one."""
        self._copy(cache).unlink(missing_ok=True)

    def _copy(self, cache: Path) -> Path:
        return cache / "copies" / hashlib.sha256(f"{self.place} {self.stamp}".encode()).hexdigest()[:32]

    def _fetch(self, target: Path) -> None:
        if self.url.startswith(PIPE):
            _run(self.url.removeprefix(PIPE), target)
            return
        for attempt in range(1, TRIES + 1):
            try:
                filesystem, path = fsspec.url_to_fs(self.url)
                options = {"desc": f"reading {shown(self.name, 40)}", "unit": "B", "unit_scale": True, "leave": False}
                filesystem.get_file(path, str(target), callback=TqdmCallback(tqdm_kwargs={**options, "disable": None}))
                return
            except Exception as error:  # every protocol has its own
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                if attempt == TRIES or isinstance(error, FileNotFoundError | ImportError | ValueError):
                    why = str(error) or type(error).__name__
                    raise DataError(f"{shown(self.url)}: cannot be read ({shown(why)}); correct the path") from None
                time.sleep(attempt)

    def _uncompress(self, file: Path, target: Path) -> None:
        opener = _compression(file)
        if opener is None:
            file.replace(target)
            return
        try:
            with opener(file) as content, open(target, "wb") as copy:
                shutil.copyfileobj(content, copy, CHUNK)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise DataError(f"{shown(self.url)}: is truncated or damaged ({error}); copy or write it again") from None


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a pipe."""
    return path.startswith(PIPE) or "://" in path


def find_files(paths: str | Sequence[str], names: str) -> list[str]:
    """The files that `paths` mean, each once, in the order of the paths and by name within each.

    Args:
        paths: files, folders, and patterns of them.
        names: pattern of the files meant in a folder; braces and `**` are known.
    Raises:
        DataError: one of the paths leads to no file.
    """
    found: dict[str, None] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        for each in [path] if not is_remote(path) and Path(path).exists() else braceexpand.braceexpand(path):
            files = list(_matching(each, names))
            if not files:
                here = "" if is_remote(each) else f" (looked for from {Path.cwd()})"
                raise DataError(f"path: {each!r} leads to no file{here}; a folder must hold {names}; correct the path")
            found.update(dict.fromkeys(files))
    return list(found)


def inside(folder: Path, names: str) -> list[str]:
    """Files of a folder whose paths below it match a pattern with braces and `**`, sorted; hidden ones are left out.

    A pattern of `.tar` files means compressed ones too, where the plain file is not there."""
    found = {path for pattern in braceexpand.braceexpand(names) for path in folder.glob(pattern) if path.is_file()}
    if names.endswith(".tar"):
        found |= {path for path in folder.glob(names + ".gz") if path.is_file() and path.with_suffix("") not in found}
    below = sorted(path.relative_to(folder) for path in found)
    return [str(path) for path in below if not any(part.startswith(".") for part in path.parts)]


def folder_state(folder: Path) -> str:
    """A text that changes when a file below a folder does, made without reading them; hidden ones are left out."""
    digest = hashlib.sha256()
    for name in inside(folder, "**/*"):
        status = (folder / name).stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _matching(path: str, names: str) -> Iterator[str]:
    if path.startswith(PIPE):
        yield path
    elif "://" in path:
        yield from _remote(path, names)
    elif Path(path).is_dir():
        yield from (str(Path(path, file)) for file in inside(Path(path), names))
    elif Path(path).is_file():
        yield path
    else:
        yield from sorted(each for each in glob.glob(path, recursive=True) if Path(each).is_file())


def _remote(path: str, names: str) -> Iterator[str]:
    """A URL that ends in "/" is a folder, one with "*" a pattern; only these are looked up now."""
    patterns = [path + name for name in braceexpand.braceexpand(names)] if path.endswith("/") else [path]
    for pattern in patterns:
        if not glob.has_magic(pattern.split("?")[0] if path.startswith("http") else pattern):
            yield pattern
            continue
        filesystem, inner = fsspec.url_to_fs(pattern)
        yield from sorted(filesystem.unstrip_protocol(each) for each in filesystem.glob(inner))


def _compression(file: Path) -> Any:
    """What opens a compressed file, known by its first bytes; None for any other."""
    with open(file, "rb") as content:
        head = content.read(8)
    return next((opener for magic, opener in COMPRESSED.items() if head.startswith(magic)), None)


def _run(command: str, target: Path) -> None:
    """Write what a command of the shell prints into `target`.

    Raises:
        DataError: it, or a command before a `|` in it, fails.
    """
    with open(target, "wb") as output:
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], stdout=output, stderr=subprocess.PIPE)
    if done.returncode:
        why = shown(done.stderr.decode(errors="replace").strip() or "it says nothing")
        raise DataError(f"pipe:{shown(command)}: ends with exit status {done.returncode} ({why}); correct the command")
