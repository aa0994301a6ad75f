"""Functions of other packages that tests and benchmarks compare with, loaded without importing the package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zoo.config import UserError

FETCHED = Path(__file__).parents[2] / ".peers"
"""Where `tools/setup.sh` unpacks the sources."""


def mamba_ssm(file: str, *names: str) -> list[Callable[..., Any]]:
    """Functions of one of mamba-ssm's Python files; see `_functions`."""
    return _functions("mamba_ssm", file, names)


def causal_conv1d(file: str, *names: str) -> list[Callable[..., Any]]:
    """Functions of one of causal-conv1d's Python files; see `_functions`."""
    return _functions("causal_conv1d", file, names)


def _functions(package: str, file: str, names: Sequence[str]) -> list[Callable[..., Any]]:
    """Functions of a package; importing it would ask for a GPU's libraries.

    Args:
        file: below the package's folder, such as "ops/selective_scan_interface.py".
        names: of module-level functions, those that others call first.
    Raises:
        UserError: the source is neither fetched, nor installed, nor in the folder that the package's variable names:
            `MAMBA_SSM_SOURCE`, `CAUSAL_CONV1D_SOURCE`.
    """
    spec, variable = importlib.util.find_spec(package), f"{package.upper()}_SOURCE"
    installed = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    fetched = FETCHED / package if (FETCHED / package).is_dir() else None
    folder = os.environ.get(variable) or fetched or installed
    if folder is None:
        raise UserError(
            f"{package}'s source is not here; `bash tools/setup.sh` fetches it, or set {variable} to its folder "
            f"{package}"
        )
    try:
        import einops
    except ImportError:
        raise UserError(f"{package}'s Python references need einops; pip install einops") from None
    text = (Path(folder) / file).read_text()
    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    for name in names:
        start = text.index(f"\ndef {name}(")
        exec(text[start : text.find("\n\n\n", start + 1)].split("\nclass ")[0], scope)
    return [scope[name] for name in names]
