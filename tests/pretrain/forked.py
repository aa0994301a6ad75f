"""Processes forked from one that has imported PyTorch, DeepSpeed and this project, which takes a fresh interpreter as
long as several small runs.

What a test starts is a process of its own all the same: with its own arguments, environment, output and signals.
"""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.context
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVER = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
"""The environment while modules are imported; what `prepare_environment` sets on a CPU, and one thread, so that nothing
runs that a fork would lose."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["deepspeed", "torch._dynamo", "torch.utils.tensorboard", "pretrain.train", "pretrain.finetune.train"]
)


class Process(multiprocessing.context.ForkServerProcess):
    """A forked process with the methods of `subprocess.Popen` that tests use."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code, minus the signal that ended it; None while it runs."""
        return self.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout or 0.0)
        return self.exitcode


def start(
    function: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str], output: Path
) -> Process:
    """Call `function` with `arguments` in a new process, whose exit code is 0 when it returns.

    Args:
        function: of a module, so that it can be found by name.
        arguments: are pickled.
        environment: the whole environment.
        output: file to which standard output and errors are appended.
    """
    saved = dict(os.environ)
    os.environ.update(SERVER)
    try:
        ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    process = Process(target=_begin, args=(function, tuple(arguments), dict(environment), output))
    process.start()
    return process


def command(module: str, words: Sequence[str], environment: Mapping[str, str], output: Path) -> Process:
    """`python -m module words…`, as `start`."""
    return start(_run_module, (module, list(words)), environment, output)


def _begin(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], output: Path) -> None:
    gc.freeze()  # what was imported stays; the collector need not look at it
    os.setpgid(0, 0)
    printed = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    multiprocessing.set_start_method(None, force=True)  # as it is in a process that is nobody's child
    function(*arguments)


def _run_module(module: str, words: list[str]) -> None:
    sys.argv = [module, *words]
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
