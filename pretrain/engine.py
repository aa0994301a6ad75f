"""A model under DeepSpeed: built, trained, saved, loaded and read back in the same way at every ZeRO stage.

`Engine` hides what differs between the stages: how the model is built and initialised, where the gradient norm is
found, how all ranks skip a step with a non-finite loss or gradient, how the whole weights are gathered. DeepSpeed is
imported late: that takes seconds and settles which accelerator is used.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pretrain import compiling, deepspeed_patches, optim
from pretrain.consolidate import stored_in_checkpoint
from pretrain.deepspeed_config import check_values
from pretrain.process_group import join_processes, local_device
from zoo.config import UserError

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


@dataclasses.dataclass(frozen=True)
class Written:
    """What one rank has written of a checkpoint."""

    checksums: dict[str, int]
    """CRC-32 of each of its files, by the path below the folder."""
    problems: list[str]
    """What went wrong, in words; empty where nothing did."""


class Writing:
    """A rank's share of a checkpoint that is being written by a thread, while training goes on.

    Args:
        write: writes it, and says what became of it.
    """

    def __init__(self, write: Callable[[], Written]) -> None:
        self._write = write
        self._written: Written | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Written:
        """Wait until all is written."""
        self._thread.join()
        assert self._written is not None, "the thread that writes the checkpoint has failed; see its error above"
        return self._written

    def _run(self) -> None:
        self._written = self._write()


class Engine:
    """A model under DeepSpeed.

    Members: `ranks` (a `Ranks`), `device`, `dtype` (of the parameters in the forward pass), `stage` (ZeRO, 0 to 3),
    `module` (call it in training and evaluation), `precision` ("fp32" or "bf16"), `optimizer_type`.

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
        compile: run training steps as compiled graphs (`pretrain.compiling`).
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
        compile: bool = False,
    ) -> None:
        config = copy.deepcopy(dict(config))
        check_values(config)
        self.ranks = join_processes(device, timeout_seconds)
        import deepspeed

        self.device = local_device(device)
        self.stage: int = config["zero_optimization"]["stage"]
        self.precision = "bf16" if config["bf16"]["enabled"] else "fp32"
        self.dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.optimizer_type = optimizer.type

        with deepspeed.zero.Init(config_dict_or_path=config) if self.stage == 3 else contextlib.nullcontext():
            model = build_model()
        masters: dict[torch.nn.Parameter, torch.Tensor] = {}
        if self.precision == "bf16":
            masters = self._initialised(initialise_model, model, seed)
        else:
            initialise_model(model, seed, self.gather)
        groups = optim.parameter_groups(model, optimizer)
        initialize: Any = deepspeed.initialize  # takes more than its annotations say
        self.module: Any = initialize(
            model=model,
            model_parameters=groups,
            optimizer=deepspeed_patches.muon if optimizer.type == "muon" else None,
            config=config,
            dist_init_required=False,
        )[0]
        self.compiled = compile
        if compile:
            compiling.compile_model(self.module.module)
        deepspeed_patches.set_masters(masters)
        # The recipe's settings of each group: learning rates are these times a factor, and a loaded
        # checkpoint does not change them.
        kept = self.module.optimizer.param_groups
        self._settings = [{k: copy.copy(v) for k, v in group.items() if k != "params"} for group in kept]
        self._frozen = not all(p.requires_grad for p in model.parameters())
        self._recorder = deepspeed_patches.record_saves(self.module)
        self._accumulating = False

    def gather(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[Any]:
        """Context in which `parameters` are whole and may be read or set; rank 0's values are kept."""
        if self.stage < 3:
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

    def _initialised(
        self, initialise_model: Callable[[torch.nn.Module, int, Gather], None], model: torch.nn.Module, seed: int
    ) -> dict[torch.nn.Parameter, torch.Tensor]:
        """Initialise a model that will be rounded to bf16, or (ZeRO-3) is already.

        Returns:
            The fp32 value of each parameter that trains, before rounding, on the CPU: whole, or this rank's part.
        """
        first: dict[torch.nn.Parameter, torch.Tensor] = {}

        @contextlib.contextmanager
        def gather(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
            with self.gather(parameters):
                for parameter in parameters:
                    parameter.data = parameter.data.float()
                yield
                for parameter in parameters:
                    first[parameter] = deepspeed_patches.own_part(parameter)
                    parameter.data = parameter.data.to(self.dtype)

        initialise_model(model, seed, gather if self.stage == 3 else self.gather)
        if self.stage < 3:
            first = {parameter: parameter.detach().float().cpu().clone() for parameter in model.parameters()}
        return {parameter: value for parameter, value in first.items() if parameter.requires_grad}

    def train(self) -> None:
        """Put the model into training mode."""
        if self.compiled:
            compiling.run_compiled(True)
        self.module.train()

    def eval(self) -> None:
        """Evaluation mode; call `module` under `torch.no_grad()`, on every rank equally often."""
        if self.compiled:
            compiling.run_compiled(False)
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
        return float(self.ranks.max(torch.where(torch.isfinite(norm), norm, math.inf)))

    def parameter_shapes(self) -> dict[str, list[int]]:
        """Whole shape of each parameter by dotted name: what a checkpoint must agree on."""
        return {name: list(optim.full_shape(p)) for name, p in self.module.module.named_parameters()}

    def save(self, folder: Path) -> Written:
        """Write model and optimizer states below `folder`, every rank its own files; all ranks call it.

        Frozen weights are left out: `initialise_model` gives them, at every start. It does not raise on a full disk:
        this rank must stay with the others through DeepSpeed's barriers, and the caller then agrees over the ranks.
        """
        return self._save(folder, later=False)

    def save_later(self, folder: Path) -> Writing:
        """As `save`, but what is saved is copied into the host's memory and written by a thread.

        The copy is as large as this rank's files. Wait for it before the next checkpoint.
        """
        self._save(folder, later=True)
        return Writing(self._write_copies)

    def _write_copies(self) -> Written:
        self._recorder.write()
        return self._written()

    def _written(self) -> Written:
        return Written(dict(self._recorder.checksums), list(self._recorder.problems))

    def _save(self, folder: Path, later: bool) -> Written:
        assert not self._accumulating, "a checkpoint holds no gradients: save between two steps"
        self._recorder.begin(folder, later)
        state = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self.module.save_checkpoint(
            str(folder), tag=TAG, client_state=state, save_latest=False, exclude_frozen_parameters=self._frozen
        )
        return self._written()

    def load(self, folder: Path, universal: bool = False) -> None:
        """Load what `save` wrote, or (`universal`) its conversion for another number of ranks; collective.

        No file runs code. Raises UserError where nothing is found, or a file holds more than tensors and plain values.
        """
        with deepspeed_patches.tensors_only(), deepspeed_patches.universal_loading(self.module, universal):
            path, _ = self.module.load_checkpoint(str(folder), tag=TAG, load_module_strict=not self._frozen)
        if path is None:
            raise UserError(f"checkpoint {str(folder)!r} holds no {TAG!r} folder; it cannot be loaded")
        deepspeed_patches.repair_loaded_groups(self.module.optimizer, self._settings)
        if self.stage > 0:  # stages 1 and 2 take the norm to clip at from the checkpoint, too
            self.module.optimizer.clip_grad = self.module.gradient_clipping()

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
        return result if self.ranks.first else {}

    def _whole(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter in fp32 on rank 0's CPU, an empty tensor elsewhere; collective."""
        import deepspeed.utils

        mastered = self.stage > 0 and parameter.requires_grad
        value = deepspeed.utils.safe_get_full_fp32_param(parameter) if mastered else None
        if value is None:  # stage 0, or a frozen parameter, which has no master copy
            with self.gather([parameter]):
                value = parameter.detach().float().clone()
        shape = optim.full_shape(parameter)
        return value.detach().reshape(shape).cpu() if self.ranks.first else torch.empty(0)

    def destroy(self) -> None:
        """Release the model; the process group stays for another engine."""
        self.module.destroy()
        self.module = None


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Whole fp32 weights and buffers by name from what `Engine.save` wrote at any stage, without an engine; on the CPU.

    Frozen weights are not among them. No file runs code: raises UserError where one holds more than tensors and plain
    values.
    """
    return {name: stored.read() for name, stored in stored_in_checkpoint(folder / TAG).items()}
