"""Whole training runs for tests: a tiny recipe, the real command on real processes, and what a run folder holds."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain import metrics
from tests.pretrain import forked

ROOT = Path(__file__).parents[2]
Process = subprocess.Popen[bytes] | forked.Process
UNSTEADY = {"seconds", "tokens_per_second", "mfu", "memory"}
"""What a run reports that depends on the clock."""

EXPERTS = {"type": "moma", "experts": {"text": 2, "image": 2}, "d_ff": 32}
LAYER = {"mixer": {"type": "attention", "heads": 2}, "feedforward": EXPERTS, "dropout": 0.1}


def tiny_recipe(data: Path | str, run: Path | str, /, **changes: Any) -> dict[str, Any]:
    """Two layers (MoMa 2t2i, MoD on the second) on the digits, ZeRO-2, 12 steps at a constant learning rate.

    Args:
        data: folder of the digits' shards.
        run: the run folder.
        changes: sections laid over these, one level deep.
    """
    recipe: dict[str, Any] = {
        "name": "tiny",
        "run_dir": str(run),
        "modalities": {
            "text": {"type": "bytes"},
            "image": {"type": "patches", "image_size": 8, "patch": 2, "codes": 16, "channels": 1},
        },
        "model": {
            "d_model": 32,
            "layers": [copy.deepcopy(LAYER), copy.deepcopy(LAYER) | {"depth": {"type": "mod", "capacity": 0.5}}],
        },
        "objective": {"type": "autoregressive", "z_loss": 1e-5},
        "data": {
            "path": str(data),
            "sequence_length": 72,
        },
        "optimizer": {"lr": 1e-2},
        # The fall begins at the last step, where its factor is still 1: train.steps may change and no rate does.
        "schedule": {"type": "wsd", "decay_steps": 1},
        "train": {"steps": 12, "global_batch": 4, "micro_batch": 2, "device": "cpu", "log_every": 1},
        "evaluate": {"rows": 8},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }
    for section, values in changes.items():
        both = isinstance(values, Mapping) and isinstance(recipe.get(section), Mapping)
        recipe[section] = {**recipe[section], **values} if both else values
    return recipe


def write_recipe(folder: Path, data: Path | str, run: Path | str, /, **changes: Any) -> Path:
    """`tiny_recipe` as a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(data, run, **changes), sort_keys=False))
    return path


class Processes:
    """The ranks of one run, each leader of a process group of its own.

    Args:
        members: the started processes.
        output: file that takes what they print.
    """

    def __init__(self, members: Sequence[Process], output: Path) -> None:
        self.members = members
        self.output = output

    @classmethod
    def of_commands(cls, commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], output: Path) -> Processes:
        """Start fresh interpreters.

        Args:
            commands: (arguments, environment) of each process.
            output: as above.
        """
        with output.open("wb") as file:
            return cls(
                [
                    subprocess.Popen(list(words), env=dict(env), cwd=ROOT, stdout=file, stderr=file, process_group=0)
                    for words, env in commands
                ],
                output,
            )

    def wait(self, seconds: float = 240.0) -> list[int]:
        """Exit code of each; whatever still runs after `seconds` is killed and fails the test."""
        end = time.monotonic() + seconds
        try:
            return [member.wait(max(end - time.monotonic(), 0.01)) for member in self.members]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.printed()}") from None
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to all at once, and to what they have started."""
        for member in self.members:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(member.pid, signal.SIGKILL)
            member.kill()
        for member in self.members:
            member.wait()

    def running(self) -> bool:
        return any(member.poll() is None for member in self.members)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 240.0) -> bool:
        """Poll until `condition()`; False where the processes ended first."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.running():
                return condition()
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"nothing happened in {seconds} s\n{self.printed()}")
            time.sleep(0.002)
        return True

    def printed(self) -> str:
        return self.output.read_text(errors="replace")[-6000:]


def environment(**more: object) -> dict[str, str]:
    """This process's environment without a launcher's variables, on one thread."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return kept | {k: str(v) for k, v in more.items()}


def start(arguments: Sequence[str | Path], output: Path, ranks: int = 1, module: str = "pretrain.train") -> Processes:
    """`python -m pretrain.train` on `ranks` ranks without the launcher, forked; one rank makes its own rendezvous."""
    words = list(map(str, arguments))
    output.write_bytes(b"")
    if ranks == 1:
        return Processes([forked.command(module, words, environment(), output)], output)
    common = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environments = [environment(RANK=r, LOCAL_RANK=r, **common) for r in range(ranks)]
    return Processes([forked.command(module, words, each, output) for each in environments], output)


def launch(arguments: Sequence[str | Path], output: Path, ranks: int = 2, module: str = "pretrain.train") -> Processes:
    """The command of the documentation: `deepspeed --num_accelerators N --module pretrain.train …`."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    arguments = ["--module", module, *map(str, arguments)]
    words = [sys.executable, *command, *arguments]
    return Processes.of_commands([(words, environment(PATH=path, DS_ACCELERATOR="cpu"))], output)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------------------------ what is left


def steady(run: Path) -> list[dict[str, Any]]:
    """The objects of `metrics.jsonl` without what depends on the clock."""
    return [{k: v for k, v in item.items() if k not in UNSTEADY} for item in metrics.read(run / "metrics.jsonl")]


def assert_same_metrics(run: Path, baseline: Path) -> None:
    """Both runs report the same numbers, bit for bit."""
    ours, theirs = steady(run), steady(baseline)
    assert [item["step"] for item in ours] == [item["step"] for item in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        different = {k: (mine.get(k), other.get(k)) for k in mine.keys() | other.keys() if mine.get(k) != other.get(k)}
        assert not different, f"step {mine['step']}: {different}"


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's scalars as its own reader shows them: tag → [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def assert_tensorboard_agrees(run: Path) -> None:
    """TensorBoard shows each number of `metrics.jsonl` once, to fp32, but for where a run was at an evaluation."""
    import numpy as np

    expected: dict[str, list[tuple[int, float]]] = {}
    for item in metrics.read(run / "metrics.jsonl"):
        where = {"tokens", "flops", "seconds"} if any(name.startswith("eval/") for name in item) else set()
        for name, value in item.items():
            if name != "step" and name not in where:
                expected.setdefault(name, []).append((item["step"], float(np.float32(value))))
    assert scalars(run) == expected


@contextlib.contextmanager
def one_rendezvous() -> Iterator[None]:
    """Let a `main` run several times in one process: its process group stays."""
    import pretrain.loop

    stop = pretrain.loop.stop_processes
    pretrain.loop.stop_processes = lambda: None
    try:
        yield
    finally:
        pretrain.loop.stop_processes = stop
