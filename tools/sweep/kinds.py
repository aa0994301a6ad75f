"""All kinds of sweeps, and how a file is opened as one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain import recipe as recipes
from tools.sweep.adapt.sweep import AdaptSweep
from tools.sweep.kind import Sweep
from tools.sweep.pretrain.sweep import PretrainSweep
from zoo.config import ConfigError

KINDS: dict[str, type[Sweep[Any]]] = {kind.type: kind for kind in (AdaptSweep, PretrainSweep)}
"""By the key `type` of a sweep's file."""


def open_sweep(path: Path, overrides: Iterable[str]) -> Sweep[Any]:
    """Read a sweep's file.

    Args:
        path, overrides: as for `pretrain.recipe.read`.
    Raises:
        ConfigError: naming the dotted key or the file, the value, the rule and the way out.
    """
    data = recipes.read(path, overrides)
    kind = data.pop("type", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ConfigError(f"type: {kind!r} is not a kind of sweep; write type: KIND, one of {', '.join(sorted(KINDS))}")
    return KINDS[kind].load(data, path.parent)
