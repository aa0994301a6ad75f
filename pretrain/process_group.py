"""The processes of a run: which device they use, how they find each other, what they do together, how they end."""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import errno
import os
import socket
import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from zoo.config import UserError

LOOPBACK = "127.0.0.1"


def rank_and_world() -> tuple[int, int]:
    """Rank and number of ranks as the launcher says, (0, 1) without one. Needs no process group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str) -> str:
    """`"cpu"` or `"cuda"` for `train.device`, which is "auto", "cpu" or "cuda".

    Raises:
        UserError: CUDA is asked for and not available, or the name is not known.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UserError("train.device: 'cuda' is not available on this machine; use auto or cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"train.device: {name!r} is not known; known: auto, cpu, cuda")
    return name


def local_device(device: str) -> torch.device:
    """The device of this rank, for what `choose_device` returned."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def prepare_environment(device: str, compile: bool = False, deterministic: bool = False) -> None:
    """Set the variables that DeepSpeed and CUDA read when they start; call it before the first `Engine` is made.

    Without the launcher this process becomes the only rank, on a free port.

    Args:
        compile: PyTorch's compiler is needed.
        deterministic: every kernel of a GPU must give the same bits for the same inputs, see `be_deterministic`.
    """
    if deterministic and device == "cuda":
        be_deterministic()
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Halves the start: DeepSpeed decorates Muon with torch.compile whichever optimizer runs, which loads the
        # whole compiler. A value that the user has set stays.
        if not compile:
            os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": LOOPBACK}
        os.environ.update(alone | {"MASTER_PORT": str(port)})
    os.environ.setdefault("LOCAL_RANK", "0")


def be_deterministic() -> None:
    """Let PyTorch take kernels that give the same bits for the same inputs, and refuse those that have none.

    cuBLAS gets a workspace of its own for each stream; sums by index and the backward passes of attention (flash and
    flex), mamba-ssm and causal-conv1d go by their deterministic branches. An operation without one raises an error that
    names it, in the first step, before any weight has moved: the backward pass of memory-efficient attention (xformers,
    and PyTorch's own under a mask), sums along a dimension (`cumsum`) of floats.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of a run and what they do together; the default is this process alone, without a process group.

    Each method but those of one rank is collective: every rank calls it, in the same order.
    """

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place, and returned."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Elementwise largest over the ranks, in place, and returned."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, a plain Python object, on every rank."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, a plain Python object, in rank order, on every rank."""
        values: list[Any] = [value] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(values, value)
        return values


ALONE = Ranks()
"""This process, without a process group."""


def join_processes(device: str, timeout_seconds: float) -> Ranks:
    """Join the launcher's process group, over gloo or NCCL, where this process has not yet.

    Args:
        device: as `choose_device` returned it; `prepare_environment` has been called with it.
        timeout_seconds: how long a rank waits for the others before it gives up.
    Ranks of a single machine listen on its loopback interface alone; one rank does not listen at all.

    Raises:
        UserError: the port on which the ranks meet is taken.
    """
    import deepspeed

    from pretrain import deepspeed_patches

    deepspeed_patches.before_start()
    if device == "cuda":
        torch.cuda.set_device(local_device(device))
    backend, timeout = "nccl" if device == "cuda" else "gloo", datetime.timedelta(seconds=timeout_seconds)
    if not torch.distributed.is_initialized():
        rank, world = rank_and_world()
        try:
            store = _meeting_place(rank, world, timeout)
            torch.distributed.init_process_group(
                backend,
                None if store else "env://",
                timeout,
                world_size=world,
                rank=rank,
                store=store,
                device_id=local_device(device) if device == "cuda" and world > 1 else None,
            )
        except (OSError, torch.distributed.DistNetworkError) as error:
            if "EADDRINUSE" not in str(error) and getattr(error, "errno", None) != errno.EADDRINUSE:
                raise
            raise UserError(
                f"port {os.environ.get('MASTER_PORT')} is in use, by another run on this machine perhaps; choose "
                "another: deepspeed --master_port 29501 …"
            ) from None
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())


def _meeting_place(rank: int, world: int, timeout: datetime.timedelta) -> torch.distributed.Store | None:
    """Where the ranks of a single machine find each other; None where there are more machines.

    torch's own would listen on every interface, to anybody.
    """
    host, port = os.environ.get("MASTER_ADDR", LOOPBACK), int(os.environ.get("MASTER_PORT", "29500"))
    if world == 1:
        return torch.distributed.HashStore()
    if host not in (LOOPBACK, "localhost"):
        return None
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    listening = -1
    if rank == 0:
        with socket.socket() as meeting:
            meeting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            meeting.bind((LOOPBACK, port))
            meeting.listen()
            listening = meeting.detach()
    place = torch.distributed.TCPStore
    if rank:
        return place(LOOPBACK, port, world, False, timeout)
    return place(LOOPBACK, port, world, True, timeout, wait_for_workers=False, master_listen_fd=listening)


def stop_processes() -> None:
    """Leave the process group; the last thing a run does."""
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process with `code`, past the interpreter's own shutdown.

    A thread of gloo's may still be about to free the tensors of the last collective, for which it needs the
    interpreter's lock; where it gets it only during the shutdown, Python unwinds that thread and C++ aborts the whole
    process ("terminate called without an active exception"), a finished run with an exit code of -6.
    """
    atexit._run_exitfuncs()  # what libraries have registered, such as the upload of a monitor
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
