"""Runs a test's function in real processes, one a rank, over gloo, and brings back what each returned."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
from pathlib import Path
from typing import Any

from tests.pretrain import forked


def run_ranks(target: str, world: int, scratch: Path, seconds: float = 150.0, **arguments: Any) -> list[Any]:
    """Call `target` ("package.module:function") with `arguments` in `world` processes; their results, by rank.

    A process that fails or takes longer than `seconds` fails the test with what it printed.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    (scratch / "arguments").write_bytes(pickle.dumps(arguments))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    common |= {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": 1}
    processes = []
    for rank in range(world):
        environment = os.environ | {k: str(v) for k, v in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        output = scratch / f"output{rank}"
        output.write_bytes(b"")
        processes.append(forked.start(_main, (target, scratch, rank), environment, output))
    try:
        codes = [process.wait(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    printed = "\n".join(f"--- rank {r}\n{(scratch / f'output{r}').read_text()[-4000:]}" for r in range(world))
    assert codes == [0] * world, f"exit codes {codes}\n{printed}"
    return [pickle.loads((scratch / f"result{rank}").read_bytes()) for rank in range(world)]


def _main(target: str, folder: Path, rank: int) -> None:
    import faulthandler

    faulthandler.dump_traceback_later(100)
    module, function = target.split(":")
    arguments = pickle.loads((folder / "arguments").read_bytes())
    result = getattr(importlib.import_module(module), function)(**arguments)
    (folder / f"result{rank}").write_bytes(pickle.dumps(result))
    from pretrain.process_group import leave, stop_processes

    stop_processes()
    leave(0)
