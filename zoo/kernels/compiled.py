"""Compile a C source of `csrc/` at first use and load it: no headers of PyTorch, about a second, kept for later
processes.

The library's name is a hash of everything that decides its code: sources, flags, compiler and the processor's features
(a home folder is often shared by unlike machines). It is written under another name and renamed, so that processes
which start at the same moment never load half a file.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

SOURCES = pathlib.Path(__file__).parent / "csrc"
FLAGS = ("-std=gnu11", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-fopenmp", "-w")
"""Never -ffast-math, see csrc/vector.h. OpenMP is compiled in but not linked: it is the one that PyTorch has loaded."""


class CompileError(RuntimeError):
    """A kernel cannot be built here; the message says why."""


def compiler() -> str | None:
    """Path of the C compiler: `CC`, or cc, gcc, clang."""
    return next(
        (found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None
    )


def cache_folder() -> pathlib.Path:
    """Where libraries are kept: `$XDG_CACHE_HOME/early-fusion-zoo`, by default below ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "early-fusion-zoo"


@functools.cache
def load(source: str, **sizes: int) -> ctypes.CDLL:
    """The library of `csrc/<source>` with the macros `sizes`.

    Raises:
        CompileError: no compiler, or it failed, or what it made does not load.
    """
    cc = compiler()
    if cc is None:
        raise CompileError("no C compiler; install gcc, or set CC")
    flags = [*FLAGS, *_machine_flags(), *(f"-D{name}={value}" for name, value in sorted(sizes.items()))]
    recipe = [cc, *flags, _processor(), *(path.read_text() for path in (SOURCES / "vector.h", SOURCES / source))]
    digest = hashlib.sha256("\0".join(recipe).encode()).hexdigest()[:24]
    name = f"{pathlib.Path(source).stem}-{digest}.so"
    library = cache_folder() / name
    try:
        if library.exists():
            return ctypes.CDLL(str(library))
        with _workshop() as folder:
            made = _compile(cc, flags, SOURCES / source, pathlib.Path(folder) / name)
            if made.parent.parent == library.parent:
                made = made.replace(library)
            return ctypes.CDLL(str(made))  # stays loaded when its file is gone
    except OSError as error:
        raise CompileError(f"{source}: {error}") from error


def _workshop() -> tempfile.TemporaryDirectory:
    """A new folder inside the cache, so that a finished library can be renamed; elsewhere where that cannot be
    written."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=cache_folder())
    except OSError:
        return tempfile.TemporaryDirectory()


def _compile(cc: str, flags: list[str], source: pathlib.Path, library: pathlib.Path) -> pathlib.Path:
    """Compile `source` into `library`."""
    code = library.with_suffix(".o")
    for command in ([cc, *flags, "-c", str(source), "-o", str(code)], [cc, "-shared", str(code), "-o", str(library)]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise CompileError(f"{' '.join(command)}: {(run.stderr or run.stdout).strip()[-500:]}")
    return library


def _machine_flags() -> list[str]:
    if platform.machine() in ("x86_64", "AMD64"):
        return ["-march=native", "-mprefer-vector-width=512"]
    return ["-mcpu=native"]


@functools.cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
