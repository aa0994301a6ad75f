"""setup.cfg declares the packages that the code imports, and no others."""

from __future__ import annotations

import ast
import configparser
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = {"zoo", "pretrain", "tools", "tests"}
DISTRIBUTIONS = {"PIL": "pillow", "markdown_it": "markdown-it-py", "sklearn": "scikit-learn", "yaml": "pyyaml"}
"""Import name to package name, where they differ by more than a dash."""
NOT_IMPORTED = {
    "causal-conv1d": "imported by name, where a GPU runs it",
    "bitsandbytes": "Transformers quantises with it",
    "aiohttp": "fsspec opens URLs with it",
    "ninja": "a program: PyTorch and DeepSpeed compile their extensions with it",
    "pytest-timeout": "a plugin of pytest",
    "pytest-xdist": "a plugin of pytest",
    "ruff": "a program",
    "pyrefly": "a program",
}


@functools.cache
def imported(folder: str) -> dict[str, str]:
    """Package name to one file below `folder` that imports it, inside functions too."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - OURS - set(sys.stdlib_module_names):
                found[DISTRIBUTIONS.get(top, top.replace("_", "-"))] = str(path.relative_to(ROOT))
    return found


def declared() -> dict[str, set[str]]:
    """Package names by extra; those always installed under ""."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = {"": config["options"]["install_requires"], **config["options.extras_require"]}
    return {
        extra: {re.match(r"[\w.-]+", line).group() for line in lines.split("\n") if line}
        for extra, lines in lists.items()
    }


def test_what_is_imported_is_declared() -> None:
    everything = set().union(*declared().values())
    packages = {name: file for folder in ("zoo", "pretrain", "tools") for name, file in imported(folder).items()}
    assert {name: file for name, file in packages.items() if name not in everything} == {}
    assert {name: file for name, file in imported("tests").items() if name not in everything} == {}


def test_what_is_declared_is_imported() -> None:
    everywhere = set().union(*(imported(folder) for folder in ("zoo", "pretrain", "tools", "tests")))
    assert set().union(*declared().values()) - everywhere == set(NOT_IMPORTED)


def test_dev_has_what_adapt_has() -> None:
    """The tests of adaptation run in the development environment."""
    assert declared()["adapt"] <= declared()["dev"]


def test_declared_versions_are_pinned() -> None:
    pinned = {
        line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line
    }
    asked = set().union(*(names for extra, names in declared().items() if extra != "gpu"))
    assert {name for name in asked if name.lower() not in pinned and name.replace("-", "_") not in pinned} == set()
