"""Functions of other packages that tests and benchmarks compare with, loaded without importing the package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from zoo.config import UserError

FETCHED = Path(__file__).parents[2] / ".peers" / "mamba_ssm"
"""Where `tools/setup.sh` unpacks the source."""


def mamba_ssm(file: str, *names: str) -> list[Callable[..., Any]]:
    """Functions of one of mamba-ssm's Python files; importing the package would ask for a GPU's libraries.

    Args:
        file: below the package's folder, such as "ops/selective_scan_interface.py".
        names: of module-level functions, those that others call first.
    Raises:
        UserError: the source is neither fetched, nor installed, nor in the folder `MAMBA_SSM_SOURCE`.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    installed = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
    fetched = FETCHED if FETCHED.is_dir() else None
    folder = os.environ.get("MAMBA_SSM_SOURCE") or fetched or installed
    if folder is None:
        raise UserError(
            "mamba-ssm's source is not here; `bash tools/setup.sh` fetches it, or set MAMBA_SSM_SOURCE to its folder "
            "mamba_ssm"
        )
    try:
        import einops
    except ImportError:
        raise UserError("mamba-ssm's Python references need einops; pip install einops") from None
    text = (Path(folder) / file).read_text()
    scope: dict[str, Any] = {"torch": torch, "F": F, "rearrange": einops.rearrange, "repeat": einops.repeat}
    for name in names:
        start = text.index(f"\ndef {name}(")
        exec(text[start : text.find("\n\n\n", start + 1)].split("\nclass ")[0], scope)
    return [scope[name] for name in names]
