"""The parts of a check: what is run, for how long at most, and what it needs."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from zoo.config import UserError, suggestion

PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--timeout", "300")


@dataclasses.dataclass(frozen=True)
class Part:
    """One process of the check."""

    name: str
    about: str
    arguments: tuple[str, ...]
    """For the Python interpreter."""
    limit: float
    """Time that it may take, in seconds."""
    extensions: bool = False
    """Whether it waits for mamba-ssm and causal-conv1d to be built."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, *self.arguments]


def known(out: Path = Path()) -> list[Part]:
    """All parts, the most valuable first; those that need the extensions stand last, while these are being built.

    Args:
        out: folder for what the parts write.
    """
    bench = ("-m", "tools.bench", "--device", "cuda", "--rounds", "3", "--json")
    return [
        Part("doctor", "what loads here", ("-m", "tools.doctor"), 60),
        Part(
            "tests",
            "kernels against their definitions",
            (*PYTEST, "tests/zoo/test_kernels.py", "tests/zoo/test_layers.py"),
            150,
        ),
        Part(
            "synchronisation",
            "forward and backward of every tiny recipe with copies to the host made an error",
            ("-m", "tools.gpu_check.synchronisation"),
            90,
        ),
        Part("launches", "time and launches of a layer", ("-m", "tools.gpu_check.launches"), 60),
        Part(
            "blocks",
            "MoMa and Mixture-of-Depths over dense, at equal FLOPs",
            (*bench, str(out / "blocks.json"), "cuda.moma", "cuda.mod"),
            90,
        ),
        Part(
            "mfu",
            "share of the peak that training steps of the recipes near 1.4B reach",
            (*bench, str(out / "mfu.json"), "cuda.mfu.dense", "cuda.mfu.moma"),
            90,
        ),
        Part(
            "training",
            "a 90M recipe by its documented entry point under DeepSpeed",
            ("-m", "tools.gpu_check.training", str(out / "training")),
            120,
        ),
        Part(
            "mamba tests",
            "mamba-ssm's and causal-conv1d's kernels against the definitions, gradients included",
            (*PYTEST, "tests/zoo/test_mamba_kernels.py"),
            300,
            extensions=True,
        ),
        Part(
            "mamba",
            "Mixture-of-Mamba over tied Mamba and over mamba-ssm's own block",
            (*bench, str(out / "mamba.json"), "cuda.mamba"),
            100,
            extensions=True,
        ),
    ]


def select(names: Sequence[str] | None, out: Path) -> list[Part]:
    """The parts called `names`; all where there are none.

    Raises:
        UserError: a name is not known.
    """
    parts = {part.name: part for part in known(out)}
    for name in names or ():
        if name not in parts:
            raise UserError(f"--only {name}: not known; known: {', '.join(parts)}{suggestion(name, parts)}")
    return [part for part in parts.values() if not names or part.name in names]
