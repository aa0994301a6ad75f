"""The training engine: the only file that imports deepspeed.

`Engine` hides what differs between the ZeRO stages: how the model is built and initialised, where the
gradient norm is found, how a step with a non-finite loss or gradient is skipped by all ranks, how the full
weights are gathered. Import this module late: importing deepspeed takes seconds and settles which accelerator
is used.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import datetime
import io
import math
import os
import socket
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from pretrain import optim
from zoo.config import ConfigError, UserError, explain

TAG = "engine"  # DeepSpeed's own folder inside a checkpoint

Gather = Callable[[list[torch.nn.Parameter]], contextlib.AbstractContextManager[Any]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What became of one optimizer step; the same on every rank.

    Attributes:
        applied: False where the step was skipped: weights and optimizer state are untouched.
        grad_norm: global L2 norm of the gradient before clipping; not finite where the step was skipped.
    """

    applied: bool
    grad_norm: float


def rank_and_world() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher says, (0, 1) without one; needs no process group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def choose_device(name: str) -> str:
    """`"cpu"` or `"cuda"` for train.device "auto", "cpu", "cuda"; UserError where cuda is asked for and absent."""
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise UserError("train.device: 'cuda' is not available on this machine; use auto or cpu")
    if name not in ("cpu", "cuda"):
        raise UserError(f"train.device: {name!r} is not known; known: auto, cpu, cuda")
    return name


def prepare_environment(device: str) -> None:
    """Set the variables that DeepSpeed reads while it is imported; call before the first `Engine`.

    Without the launcher this process becomes the only rank, on a free port.
    """
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        # Halves the start: DeepSpeed decorates Muon with torch.compile whichever optimizer runs, which loads the
        # whole compiler. A value the user has set stays.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(port)})
    os.environ.setdefault("LOCAL_RANK", "0")


def check_values(config: Mapping[str, Any]) -> None:
    """Validate the values inside the sections with DeepSpeed's own models; ConfigError in our words."""
    import pydantic
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for key, model in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config)):
        try:
            model(**config.get(key, {}))
        except pydantic.ValidationError as error:
            raise ConfigError(explain(error, f"deepspeed.{key}", model)) from None


class Engine:
    """A model under DeepSpeed.

    Members: `rank`, `world`, `device`, `dtype` (of the parameters in the forward pass), `stage` (ZeRO, 0 to
    3), `module` (call it in training and evaluation), `precision` ("fp32" or "bf16").

    Args:
        build_model: makes the model. Called under `deepspeed.zero.Init` at stage 3, so it must not read
        weights.
        initialise_model: `(model, seed, gather)` sets every weight from the seed and the parameter's name
            alone, inside `with gather([parameters]):`, so that every stage and number of ranks starts from
            one model.
        config: what `deepspeed_config.effective` returned.
        optimizer: the recipe's optimizer section.
        seed: of the initial weights.
        device: "cpu" or "cuda"; see `choose_device`. `prepare_environment` has been called with it.
        timeout_seconds: how long a rank waits for the others before it gives up.
    """

    def __init__(
        self,
        build_model: Callable[[], torch.nn.Module],
        initialise_model: Callable[[torch.nn.Module, int, Gather], None],
        config: Mapping[str, Any],
        optimizer: optim.OptimizerConfig,
        seed: int,
        device: str,
        timeout_seconds: float = 1800.0,
    ) -> None:
        config = copy.deepcopy(dict(config))
        check_values(config)
        _start_processes(device, timeout_seconds)
        import deepspeed

        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.device = _local_device(device)
        self.stage: int = config["zero_optimization"]["stage"]
        self.precision = "bf16" if config["bf16"]["enabled"] else "fp32"
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.optimizer_type = optimizer.type

        with deepspeed.zero.Init(config_dict_or_path=config) if self.stage == 3 else contextlib.nullcontext():
            model = build_model()
        initialise_model(model, seed, self.gather)
        groups = optim.parameter_groups(model, optimizer)
        self.module: Any
        self.module, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            optimizer=_muon if optimizer.type == "muon" else None,
            config=config,
            dist_init_required=False,
        )
        # The recipe's settings of each group: learning rates are these times a factor, and a loaded
        # checkpoint does not change them.
        kept = self.module.optimizer.param_groups
        self._settings = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in kept]
        self._frozen = not all(p.requires_grad for p in model.parameters())
        self._recorder = _record_saves(self.module)
        self._accumulating = False

    def gather(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Context in which `parameters` are whole and may be read or set; rank 0's values are kept."""
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

    def train(self) -> None:
        """Training mode."""
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode; call `module` under `torch.no_grad()`, on every rank equally often."""
        self.module.eval()

    def backward(self, loss: torch.Tensor, last: bool = True) -> None:
        """Add the gradient of `loss` (a scalar) to this step's.

        Gradients are summed over micro-batches and averaged over ranks: give the micro-batch's sum of losses
        × ranks / number of terms in the whole step.

        Args:
            last: whether this is the step's last micro-batch, after which gradients are reduced.
        """
        # A non-finite loss can have a finite gradient. Times NaN it has none, on no rank after the reduction,
        # and the step is skipped below without asking the device now. Times 1 the gradient keeps every bit.
        self._accumulating = True
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss.dtype)
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss * poison, scale_wrt_gas=False)

    def step(self, learning_rate_factor: float) -> StepResult:
        """Clip and apply the accumulated gradient at the peak learning rates × `learning_rate_factor`.

        A non-finite gradient or loss on any rank skips the step on all of them.
        """
        self._accumulating = False
        for group, settings in zip(self.module.optimizer.param_groups, self._settings, strict=True):
            group["lr"] = settings["lr"] * learning_rate_factor
        if self.stage == 0:
            norm = self._plain_norm()
            if not math.isfinite(norm):
                self.module.zero_grad()
                return StepResult(applied=False, grad_norm=norm)
            self.module.step()
            return StepResult(applied=True, grad_norm=norm)
        self.module.step()
        norm = float(self.module.get_global_grad_norm())
        return StepResult(applied=self.module.was_step_applied(), grad_norm=norm)

    def _plain_norm(self) -> float:
        """Norm of the reduced gradient where no ZeRO optimizer computes it; the same number on every rank."""
        gradients = [p.grad for p in self.module.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).double()
        return float(self.all_reduce_max(torch.where(torch.isfinite(norm), norm, math.inf)))

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, in place, and returned."""
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.SUM)
        return tensor

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Elementwise largest over the ranks, in place, and returned."""
        torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor

    def barrier(self) -> None:
        """Wait for every rank."""
        torch.distributed.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, a plain Python object, on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        values: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Whole shape of each parameter by dotted name: what a checkpoint must agree on."""
        return {name: list(optim.full_shape(p)) for name, p in self.module.module.named_parameters()}

    def save(self, folder: Path) -> tuple[dict[str, int], list[str]]:
        """Write model and optimizer states below `folder`, every rank its own files; all ranks call it.

        Frozen weights are left out: `initialise_model` gives them, at every start.

        Returns: checksum (CRC-32) of each file this rank wrote by its path below `folder`, and what went
        wrong, in words. It does not raise on a full disk: this rank must stay with the others through
        DeepSpeed's barriers, and the caller then agrees over the ranks.
        """
        assert not self._accumulating, "a checkpoint holds no gradients: save between two steps"
        self._recorder.begin(folder)
        state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self.module.save_checkpoint(
            str(folder), tag=TAG, client_state=state, save_latest=False, exclude_frozen_parameters=self._frozen
        )
        return dict(self._recorder.checksums), list(self._recorder.problems)

    def load(self, folder: Path, universal: bool = False) -> None:
        """Load what `save` wrote, or (`universal`) its conversion for another number of ranks; collective.

        The files are unpickled: they must come from a run of one's own. Raises UserError where nothing is
        found.
        """
        # DeepSpeed reads this flag at load time only; which kind it is depends on what is found on disk.
        self.module._config.load_universal_checkpoint = universal
        try:
            path, _ = self.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._frozen)
        finally:
            self.module._config.load_universal_checkpoint = False
        if path is None:
            raise UserError(f"checkpoint {str(folder)!r} holds no {TAG!r} folder; it cannot be loaded")
        self._repair_groups()

    def _repair_groups(self) -> None:
        """Give each group its own settings, and each flat parameter a step counter of its own.

        Loading a universal checkpoint at stage 3 copies group 0's settings (weight decay, epsilon) onto every
        group, and makes all share one step tensor, which Adam then advances once a group.
        """
        optimizer = self.module.optimizer
        for group, settings in zip(optimizer.param_groups, self._settings, strict=True):
            group.update({k: copy.copy(v) for k, v in settings.items()})
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """Whole weights in fp32 (the master copy) and buffers by name, on the CPU; empty except on rank 0.

        Collective: all ranks call it. Shared parameters appear under each of their names.
        """
        model = self.module.module
        result: dict[str, torch.Tensor] = {}
        whole: dict[int, torch.Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) not in whole:
                whole[id(parameter)] = self._whole(parameter)
            result[name] = whole[id(parameter)]
        saved = set(model.state_dict(keep_vars=True))
        buffers = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name in saved}
        result |= {name: buffer.detach().cpu().clone() for name, buffer in buffers.items()}
        return result if self.rank == 0 else {}

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter in fp32 on rank 0's CPU, an empty tensor elsewhere; collective."""
        import deepspeed.utils

        mastered = self.stage > 0 and parameter.requires_grad
        value = deepspeed.utils.safe_get_full_fp32_param(parameter) if mastered else None
        if value is None:  # stage 0, or a frozen parameter, which has no master copy
            with self.gather([parameter]):
                value = parameter.detach().float().clone()
        shape = optim.full_shape(parameter)
        return value.detach().reshape(shape).cpu() if self.rank == 0 else torch.empty(0)

    def destroy(self) -> None:
        """Release the model; the process group stays for another engine."""
        self.module.destroy()
        self.module = None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and buffers by name from what `Engine.save` wrote at any stage, without an engine; on the CPU.

    Frozen weights are not among them. The files are unpickled: they must come from a run of one's own.
    """
    import deepspeed.utils.zero_to_fp32 as converter

    path = str(folder / TAG)
    models = converter.get_model_state_files(path)
    if not list((folder / TAG).glob("*_optim_states.pt")):  # stage 0 keeps the optimizer beside the model
        return torch.load(models[0], map_location="cpu", weights_only=False)["module"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        parts = converter.get_optim_files(path)
        first = torch.load(parts[0], map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"]
        if "zero_stage" in first:
            return converter.get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG)
        # stage 1 in bf16 with fp32 accumulation has an optimizer of its own, which DeepSpeed's converter does not
        # know, though its flat groups are those of stage 2
        states = [torch.load(part, map_location="cpu", mmap=True, weights_only=False) for part in parts]
        groups = [state["optimizer_state_dict"]["single_partition_of_fp32_groups"] for state in states]
        return converter._get_fp32_state_dict_from_zero2_checkpoint(
            len(parts), groups, converter.parse_model_states(models), False
        )


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


def _start_processes(device: str, timeout_seconds: float) -> None:
    """Join the process group of the launcher, over gloo or NCCL; nothing where it is there already.

    Raises UserError where the port on which the ranks meet is taken.
    """
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer

    # Else DeepSpeed compiles its shared-memory collectives at the first start on a CPU (about 30 s, needs
    # g++) for the inference paths that use them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed 0.19.8 calls collectives that torch has renamed since, and would say so at every micro-batch.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Its bf16 optimizer prints the state of the memory eight times while it is made.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda message, force=False: None
    if device == "cuda":
        torch.cuda.set_device(_local_device(device))
    if deepspeed.comm.is_initialized():
        return
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            verbose=False,
        )
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ.get('MASTER_PORT')} is in use, by another run on this machine perhaps; choose another: "
            "deepspeed --master_port 29501 …"
        ) from None


def _local_device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _muon(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon with torch's AdamW for the other groups (`optim.parameter_groups` has marked them)."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={})


def _record_saves(module: Any) -> Any:
    """Replace the writer of `module`'s checkpoints by one that syncs, takes checksums and never raises."""
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    class RecordingCheckpointEngine(TorchCheckpointEngine):
        """A rank that raised while writing would leave the others waiting in DeepSpeed's barrier."""

        def begin(self, folder: Path) -> None:
            self.folder, self.checksums, self.problems = folder, {}, []

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            with self._noted(path):
                os.makedirs(path, exist_ok=exist_ok)

        def save(self, state_dict: Any, path: str) -> None:
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


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
