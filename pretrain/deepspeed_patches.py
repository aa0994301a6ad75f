"""What is changed in DeepSpeed 0.19.8 while it runs, and why; each function is one change or one kind of it.

Nothing on the disk is touched. When DeepSpeed is renewed, read this file first: a change whose reason is gone goes too.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from zoo.config import UserError
from zoo.files import checksum


def before_start() -> None:
    """Keep the start short and the output readable; call it before the process group is made."""
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    # Else DeepSpeed compiles its shared-memory collectives at the first start on a CPU (about 30 s, needs g++), for
    # inference paths that are not used here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It calls collectives that torch has renamed since, and torch would say so at every micro-batch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its bf16 optimizer prints the state of the memory eight times while it is made.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None


def muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, with torch's AdamW for the groups that `optim.parameter_groups` has not marked for Muon.

    DeepSpeed asks each parameter whether it is Muon's, where torch asks the group.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={})


def own_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """This rank's part, on the CPU, of what rank 0 has as the whole value of a parameter partitioned by ZeRO-3."""
    value = parameter.detach().clone().flatten()
    torch.distributed.broadcast(value, src=0)
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  the last rank's part is padded
    first = torch.distributed.get_rank() * size
    part = value[first : first + size]
    return torch.nn.functional.pad(part, (0, size - part.numel())).cpu()


def set_masters(values: Mapping[torch.nn.Parameter, torch.Tensor]) -> None:
    """Set the fp32 copies that the optimizer steps.

    DeepSpeed makes them of weights that are rounded to bf16 by then.

    Args:
        values: of the whole parameter, or of this rank's part where it is partitioned (`own_part`).
    """
    import deepspeed.utils

    for parameter, value in values.items():
        if hasattr(parameter, "ds_id"):
            deepspeed.utils.safe_set_local_fp32_param(parameter, value)
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)


def record_saves(module: Any) -> Any:
    """Replace the writer of `module`'s checkpoints by one that syncs, takes checksums and never raises.

    DeepSpeed's own leaves files in memory, and a rank that raised while writing would leave the others waiting in
    DeepSpeed's barrier. The returned writer has `begin(folder, later)`, `write()`, `checksums` and `problems`. Where
    `later`, saving copies what is to be saved into the host's memory, and `write()` writes it, from any thread.
    """
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        def begin(self, folder: Path, later: bool) -> None:
            self.folder, self.checksums, self.problems = folder, {}, []
            self.later, self.waiting = later, []

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            with self._noted(path):
                os.makedirs(path, exist_ok=exist_ok)

        def save(self, state_dict: Any, path: str) -> None:
            if self.later:
                self.waiting.append((_copied(state_dict), path))
            else:
                self._write(state_dict, path)

        def write(self) -> None:
            while self.waiting:
                self._write(*self.waiting.pop(0))

        def _write(self, state_dict: Any, path: str) -> None:
            with self._noted(path):
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
                    file.flush()
                    os.fsync(file.fileno())
                self.checksums[str(Path(path).relative_to(self.folder))] = checksum(Path(path))

        @contextlib.contextmanager
        def _noted(self, path: str) -> Iterator[None]:
            try:
                yield
            except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
                self.problems.append(f"{path}: {error}")

    module.checkpoint_engine = RecordingCheckpointEngine()
    # DeepSpeed also copies two conversion scripts, on rank 0 alone and unguarded; export is safetensors here.
    module._copy_recovery_script = lambda path: None
    return module.checkpoint_engine


def _copied(state: Any) -> Any:
    """The same containers with copies of the tensors in the host's memory; a tensor that stands twice stays one."""
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    return tree_map_only(torch.Tensor, copied, state)


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """Let `torch.load` make tensors and plain values alone, in this process and in those that it starts.

    DeepSpeed asks for full unpickling wherever it reads a file, and that runs whatever code the file names. A variable
    of torch's overrules it. The classes of DeepSpeed's own that stand in its files hold numbers alone.

    Raises:
        UserError: a file holds anything else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"a file of tensors names {found[1] if found else 'what no tensor needs'}, which could run code; nothing of"
            " it was run. No checkpoint of this library holds such a thing: do not trust the folder"
        ) from None
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def convert(source: str, target: str, workers: int) -> None:
    """Run DeepSpeed's converter to universal checkpoints, in a process of its own.

    Args:
        source, target: folders of a checkpoint's files of tensors, below the current folder.
        workers: processes that it forks.
    """
    from deepspeed.checkpoint import ds_to_universal

    multiprocessing.set_start_method("fork")  # what may be read is told to this process and those forked from it
    counts = [f"--num_extract_workers={workers}", f"--num_merge_workers={workers}"]
    sys.argv[1:] = [f"--input_folder={source}", f"--output_folder={target}", *counts]
    with tensors_only():
        ds_to_universal.main(ds_to_universal.parse_arguments())


@contextlib.contextmanager
def universal_loading(module: Any, universal: bool) -> Iterator[None]:
    """Let `module.load_checkpoint` read a universal checkpoint, or an ordinary one.

    DeepSpeed takes it from its config, read at load time only; which kind it is depends on what is found on disk.
    """
    module._config.load_universal_checkpoint = universal
    try:
        yield
    finally:
        module._config.load_universal_checkpoint = False


def repair_loaded_groups(optimizer: Any, settings: Sequence[Mapping[str, Any]]) -> None:
    """Give each group its own settings again, and each flat parameter a step counter of its own.

    Loading a universal checkpoint at stage 3 copies group 0's settings (weight decay, epsilon) onto every group, and
    makes all share one step tensor, which Adam then advances once a group.

    Args:
        settings: of each group, as they were before loading.
    """
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update({key: copy.copy(value) for key, value in own.items()})
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
