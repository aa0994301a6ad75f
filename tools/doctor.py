"""Say which backends and accelerators load here, and why the others do not: python -m tools.doctor"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import zoo.kernels

PACKAGES = ("torch", "deepspeed", "webdataset", "tensorboard", "tokenizers", "xformers", "mamba-ssm", "causal-conv1d")
GPU_MODULES = {
    "xformers": "xformers.ops",
    "mamba-ssm": "mamba_ssm.ops.selective_scan_interface",
    "causal-conv1d": "causal_conv1d",
}


def main(arguments: Sequence[str] | None = None) -> int:
    _, more = argparse.ArgumentParser(prog="tools.doctor", description=__doc__).parse_known_args(arguments)
    if more:
        print(
            f"error: {shlex.join(more)}: tools.doctor takes no argument, it says what loads here; "
            "python -m tools.check RECIPE validates a recipe",
            file=sys.stderr,
        )
        return 2
    table = Table("what", "state", "detail")
    for name, state, detail in [*accelerators(), *packages(), *compilers(), *kernels()]:
        color = {"yes": "green", "no": "red"}.get(state, "yellow")
        table.add_row(name, f"[{color}]{state}[/{color}]", escape(detail))
    Console().print(table)
    return 0


def accelerators() -> list[tuple[str, str, str]]:
    """The host and every CUDA device."""
    rows = [("cpu", "yes", f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")]
    if not torch.cuda.is_available():
        why = (
            "torch is a build without CUDA"
            if torch.version.cuda is None
            else f"torch has CUDA {torch.version.cuda}, no device"
        )
        return [*rows, ("cuda", "no", why)]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append(
            (f"cuda:{index}", "yes", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
        )
    return rows


def packages() -> list[tuple[str, str, str]]:
    """Versions; GPU packages are imported too, since one that is installed may still not load."""
    rows = []
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "no" if name not in GPU_MODULES else "absent", "not installed" + _extra(name)))
            continue
        problem = _problem(lambda name=name: importlib.import_module(GPU_MODULES[name])) if name in GPU_MODULES else ""
        rows.append((name, "no" if problem else "yes", f"{version}{': ' + problem if problem else ''}"))
    return rows


def compilers() -> list[tuple[str, str, str]]:
    """What DeepSpeed's CPU offloading needs for building its optimizer at first use."""
    rows = []
    for name in ("g++", "ninja"):
        path = shutil.which(name)
        rows.append(
            (name, "yes" if path else "absent", path or "needed for deepspeed.zero_optimization.offload_optimizer")
        )
    return rows


def kernels() -> list[tuple[str, str, str]]:
    """What `auto` takes for each operation on the device that training would take, and for every other backend whether
    it works here or why not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for operation, backends in zoo.kernels.OPERATIONS.items():
        choice = zoo.kernels.choose(operation, device=device)
        rows.append((f"kernels.{operation}", choice.backend, f"auto on {device}: {choice.reason}"))
        for name in backends:
            reason = zoo.kernels.missing(operation, name)
            if name != choice.backend:
                rows.append((f"  {name}", "no" if reason else "yes", reason or "works here"))
    return rows


def _extra(name: str) -> str:
    return "; pip install -e .[gpu] on a machine with CUDA" if name in GPU_MODULES else ""


def _problem(action: Callable[[], object]) -> str:
    """Why an import fails, in one line; GPU packages raise anything from ImportError to RuntimeError."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


if __name__ == "__main__":
    sys.exit(main())
