"""What a run was made with: Python, the versions of packages, the commit of this library."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, Any]:
    """Plain data: `python`, `platform`, `packages` by name, and the `commit` of the library's own repository, with
    whether it has been `changed` since; both are None where there is no repository or no git."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": None if status is None else bool(status),
        "packages": _packages(),
    }


@functools.cache
def _packages() -> dict[str, str]:
    """Version by name. Each one's file is parsed, some tenths of a second in all: once a process."""
    every = [found.metadata for found in importlib.metadata.distributions()]
    return {each["Name"]: each["Version"] for each in sorted(every, key=lambda each: each["Name"].lower())}


def _git(*arguments: str) -> str | None:
    """What git prints about the library's repository."""
    if not (ROOT / ".git").exists():  # a repository that the library was installed into is another
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
