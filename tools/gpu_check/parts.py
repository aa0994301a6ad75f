"""The parts of a check: what is run, for how long at most, and what it needs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.config import UserError, suggestion

PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--timeout", "300")
BENCH = ("-m", "tools.bench", "--device", "cuda", "--rounds", "3")


@dataclasses.dataclass(frozen=True)
class CheckPart:
    """One process of the check."""

    name: str
    about: str
    arguments: tuple[str, ...]
    """For the Python interpreter."""
    limit: float
    """Time that it may take, in seconds."""
    writes: str = ""
    """What it leaves below the folder of the check; the path is its last argument. Empty: it only prints."""
    extensions: bool = False
    """Whether it waits for mamba-ssm and causal-conv1d to be built."""

    def command(self, out: Path) -> list[str]:
        """The command line, of a check whose folder is `out`."""
        return [sys.executable, *self.arguments, *([str(out / self.writes)] if self.writes else [])]


PARTS = (
    CheckPart("doctor", "what loads here", ("-m", "tools.doctor"), 60),
    CheckPart(
        "tests",
        "kernels against their definitions",
        (*PYTEST, "tests/zoo/test_kernels.py", "tests/zoo/test_layers.py"),
        150,
    ),
    CheckPart(
        "synchronisation",
        "forward and backward of every tiny recipe with copies to the host made an error",
        ("-m", "tools.gpu_check.synchronisation"),
        90,
    ),
    CheckPart("launches", "time and launches of a layer", ("-m", "tools.gpu_check.launches"), 60),
    CheckPart(
        "blocks",
        "MoMa and Mixture-of-Depths over dense, at equal FLOPs",
        (*BENCH, "cuda.moma", "cuda.mod", "--json"),
        90,
        writes="blocks.json",
    ),
    CheckPart(
        "mfu",
        "share of the peak that training steps of the recipes near 1.4B reach",
        (*BENCH, "cuda.mfu.dense", "cuda.mfu.moma", "--json"),
        90,
        writes="mfu.json",
    ),
    CheckPart(
        "training",
        "a 90M recipe by its documented entry point under DeepSpeed",
        ("-m", "tools.gpu_check.training"),
        120,
        writes="training",
    ),
    CheckPart(
        "mamba tests",
        "mamba-ssm's and causal-conv1d's kernels against the definitions, gradients included",
        (*PYTEST, "tests/zoo/test_mamba_kernels.py"),
        300,
        extensions=True,
    ),
    CheckPart(
        "mamba",
        "Mixture-of-Mamba over tied Mamba and over mamba-ssm's own block",
        (*BENCH, "cuda.mamba", "--json"),
        100,
        writes="mamba.json",
        extensions=True,
    ),
)
"""All parts, the most valuable first; those that need the extensions stand last, while these are being built."""


def select(names: Sequence[str] | None) -> list[CheckPart]:
    """The parts called `names`; all where there are none.

    Raises:
        UserError: a name is not known.
    """
    known = [part.name for part in PARTS]
    for name in names or ():
        if name not in known:
            raise UserError(f"--only {name}: not known; known: {', '.join(known)}{suggestion(name, known)}")
    return [part for part in PARTS if not names or part.name in names]
