"""The choice of backend: a name asked for and missing is an error, `auto` takes the fastest that is here and says why.

`reference.py` defines the operations; a backend is a file with the same function names. Attention, scan, state-space
dual (`ssd`) and causal convolution have a backend for each device: a block asks again where its values are.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping

from zoo.config import ConfigError, suggestion
from zoo.kernels import chunked, cpu, flex, grouped, mamba_ssm, outlines, per_document, reference, sdpa, xformers

_ATTENTION: dict[str, types.ModuleType] = {
    "reference": reference,
    "sdpa": sdpa,
    "per_document": per_document,
    "xformers": xformers,
    "flex": flex,
}
_EXPERTS: dict[str, types.ModuleType] = {"reference": reference, "grouped": grouped}
_RECURRENT: dict[str, types.ModuleType] = {
    "reference": reference,
    "chunked": chunked,
    "cpu": cpu,
    "mamba_ssm": mamba_ssm,
}
OPERATIONS: dict[str, dict[str, types.ModuleType]] = {
    "attention": _ATTENTION,
    "experts": _EXPERTS,
    "scan": _RECURRENT,
    "ssd": _RECURRENT,
    "conv": _RECURRENT,
}
OUTLINES, OUTLINED = "outlines", "there is nothing to compute; what a GPU's kernels would hold is made"
"""The backend of attention on the meta device, for which nobody can ask by name; and why it is taken."""
OPTIONAL = (cpu, mamba_ssm, flex, xformers)
"""Backends that do not work everywhere: each has a `missing()`, which says why it does not work here, or None."""


@dataclasses.dataclass(frozen=True)
class ChosenBackend:
    """What runs for one operation, and why."""

    operation: str
    backend: str
    reason: str

    @property
    def module(self) -> types.ModuleType:
        return outlines if self.backend == OUTLINES else OPERATIONS[self.operation][self.backend]


def _attention(device: str) -> tuple[str, str]:
    if device == "meta":
        return OUTLINES, OUTLINED
    saved = "no work on pairs of tokens of different documents; plain causal sdpa where a row is one document"
    if device != "cuda":
        return "per_document", saved
    reasons = []  # on a GPU a call for each length of document waits for its launches
    for name in ("flex", "xformers"):
        reason = missing("attention", name)
        if reason is None:
            return name, f"one kernel for all documents, {saved}"
        reasons.append(f"no {name}: {reason}")
    return "per_document", f"{saved}; {'; '.join(reasons)}"


def _experts(device: str) -> tuple[str, str]:
    return "grouped", "one batched product where experts have equally many rows"


def _recurrent(device: str) -> tuple[str, str]:
    if device == "meta":
        return "mamba_ssm", OUTLINED
    if device == "cuda":
        reason = mamba_ssm.missing()
        return ("mamba_ssm", "fused CUDA kernels") if reason is None else ("chunked", f"no mamba_ssm: {reason}")
    reason = cpu.missing()
    if reason is None:
        return "cpu", "compiled C that steps through rows by index"
    return "chunked", f"plain PyTorch; no compiled kernel: {reason}"


_AUTO: dict[str, Callable[[str], tuple[str, str]]] = {
    "attention": _attention,
    "experts": _experts,
    "scan": _recurrent,
    "ssd": _recurrent,
    "conv": _recurrent,
}


def missing(operation: str, backend: str) -> str | None:
    """Why a known backend of an operation does not work here; None where it does."""
    module = OPERATIONS[operation][backend]
    return module.missing() if module in OPTIONAL else None


def available(operation: str) -> list[str]:
    """The backends of an operation that work here."""
    return [name for name in OPERATIONS[operation] if missing(operation, name) is None]


def choose(operation: str, backend: str = "auto", device: str = "cpu") -> ChosenBackend:
    """The backend of an operation.

    Args:
        backend: its name, as in a recipe's `kernels`; "auto" takes the best that works here.
        device: type of the device it shall run on ("cpu", "cuda", "meta"); matters to `auto` alone.
    Raises:
        ConfigError: the name is not known, or what was asked for does not load here.
    """
    known = OPERATIONS[operation]
    if backend == "auto":
        return ChosenBackend(operation, *_AUTO[operation](device))
    if backend not in known:
        names = ["auto", *known]
        raise ConfigError(
            f"kernels.{operation}: {backend!r} is not known; known: {', '.join(names)}{suggestion(backend, names)}"
        )
    reason = missing(operation, backend)
    if reason is not None:
        raise ConfigError(f"kernels.{operation}: {backend!r} does not load here: {reason}; choose auto")
    return ChosenBackend(operation, backend, "asked for")


def check(kernels: Mapping[str, str], device: str = "cpu") -> list[ChosenBackend]:
    """Every operation's choice under the recipe's `kernels:` section.

    Raises:
        ConfigError: an operation or a backend is not known, or does not load here.
    """
    for operation in kernels:
        if operation not in OPERATIONS:
            known = ", ".join(OPERATIONS)
            raise ConfigError(f"kernels.{operation}: unknown key; known: {known}{suggestion(operation, OPERATIONS)}")
    return [choose(operation, kernels.get(operation, "auto"), device) for operation in OPERATIONS]
