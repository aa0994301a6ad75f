"""What a rank of a run holds: weights, gradients and optimizer states by ZeRO's stage, activations and logits by a
micro-batch that is run on the meta device, where nothing is computed or allocated and every storage is counted."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import zoo
from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from zoo.batch import Batch
from zoo.carries import nothing
from zoo.config import ConfigError
from zoo.context import Counts, Kept, TokenContext
from zoo.depth import MixtureOfDepths
from zoo.storages import StorageMeter
from zoo.trace import Trace

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SPARE = 0.1
"""Share of an accelerator's memory that recipes leave to gaps between blocks, to communication and to workspaces."""
STATE_BYTES, STEP_BYTES = 12, 4
"""Bytes a parameter of a rank's share: what the optimizer keeps (its averages and the fp32 weight), and what torch's
AdamW on a GPU makes besides for a moment (a square root)."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch holds beside weights, with fused kernels as on a GPU. Gradients of weights go as soon
    as they are whole, as ZeRO takes them over."""

    peak: int
    """Most at once, over forward and backward pass."""
    held: int
    """At the end of the forward pass."""
    logits: int
    """All logits in fp32. They never exist at once where they are large, see `zoo.cross_entropy`."""


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of a run, on its accelerator unless said otherwise."""

    zero_stage: int
    ranks: int
    weights: int
    gradients: int
    """As they are accumulated, and those in the weights' precision until they are."""
    optimizer: int
    """Adam's averages or Muon's momentum, and the fp32 copy of the weights where there is one."""
    optimizer_offloaded: bool
    """The optimizer's are in the host's memory."""
    buckets: int
    """What gradients are gathered in before they are reduced."""
    activations: Activations | None
    """What a micro-batch holds; None where that is not known."""

    @property
    def on_device(self) -> int:
        """What stays on the accelerator from step to step."""
        return self.weights + self.gradients + self.buckets + (0 if self.optimizer_offloaded else self.optimizer)

    @property
    def peak(self) -> int:
        """Most at once: in a micro-batch, or in the optimizer's step."""
        return self.on_device + max(self.activations.peak if self.activations else 0, self.step)

    @property
    def step(self) -> int:
        """What the optimizer's step holds for a moment."""
        return 0 if self.optimizer_offloaded else self.optimizer * STEP_BYTES // STATE_BYTES

    def facts(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self) | {"on_device": self.on_device, "step": self.step, "peak": self.peak}


def of_rank(
    recipe: Recipe, objective: zoo.Objective, parameters: int, ranks: int, with_activations: bool = True
) -> RankMemory:
    """What a rank of a run of `recipe` holds.

    Weights, gradients and states are counted as DeepSpeed 0.19.8 keeps them, seen on a CPU. fp32 weights are their own
    master copy at stage 0; ZeRO keeps a partitioned fp32 copy for the optimizer. Gradients are accumulated in fp32, and
    exist once more in the weights' precision: at stage 1 in bf16 all of them until the step ends; at higher stages, and
    at stage 1 in fp32, this rank's share.

    Args:
        parameters: of the whole model.
        with_activations: whether a micro-batch is run on the meta device, which takes a second or two.
    """
    zero = recipes.launch_config(recipe, ranks)["zero_optimization"]
    stage, element = zero["stage"], DTYPES[recipe.train.precision].itemsize
    states = 4 * (2 if recipe.optimizer.type == "adamw" else 1)
    master = 4 if stage > 0 or element < 4 else 0
    bucket = min(int(zero.get("reduce_bucket_size", REDUCE_BUCKET)), parameters) * element if stage > 0 else 0
    return RankMemory(
        zero_stage=stage,
        ranks=ranks,
        weights=parameters * element // (ranks if stage == 3 else 1),
        gradients=_gradients(parameters, stage, element, ranks),
        optimizer=parameters * (states + master) // (ranks if stage >= 1 else 1),
        optimizer_offloaded=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
        buckets=bucket * (2 if zero.get("overlap_comm", stage == 3) else 1),
        activations=activations(recipe, objective) if with_activations else None,
    )


def _gradients(parameters: int, stage: int, element: int, ranks: int) -> int:
    """Bytes of a rank's gradients; see `of_rank`."""
    if stage == 0:
        return 4 * parameters
    if stage > 1:
        return parameters * (4 + element) // ranks
    return 4 * parameters + element * parameters // (1 if element < 4 else ranks)


REDUCE_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size` where nothing is said."""


def check_fits(memory: RankMemory, capacity: float, spare: float = SPARE) -> None:
    """Raise `ConfigError` where a rank needs more than an accelerator has.

    Args:
        capacity: bytes of an accelerator.
        spare: share of them that must be left.
    """
    if memory.peak <= (1 - spare) * capacity:
        return
    known = f" and {_gib(memory.activations.peak)} of activations" if memory.activations else ""
    raise ConfigError(
        f"deepspeed.zero_optimization.stage: {memory.zero_stage} on {memory.ranks} rank(s) needs {_gib(memory.peak)} a "
        f"rank ({_gib(memory.on_device)} of weights, gradients and optimizer states{known}), and an accelerator has "
        f"{_gib(capacity)}, of which {spare:.0%} stay free; set train.activation_checkpointing: true, a smaller "
        "train.micro_batch, a higher stage on more accelerators, or zero_optimization.offload_optimizer: {device: cpu}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


# --------------------------------------------------------------------------------------------------------- activations

ENOUGH_REPEATS = 3
"""Repeats of a pattern of layers that are run; each further one adds what the last one added."""


def activations(recipe: Recipe, objective: zoo.Objective) -> Activations | None:
    """What a micro-batch of full rows holds; None where a block of the model cannot be run without values."""
    repeat = recipe.model.repeat
    varying = any(
        isinstance(layer.depth, MixtureOfDepths.Config) and layer.depth.over_layers is not None
        for layer in recipe.model.layers
    )
    batch, runs = batch_of(recipe), [repeat]
    if repeat > ENOUGH_REPEATS and not varying:
        runs = [ENOUGH_REPEATS - 1, ENOUGH_REPEATS]
    try:
        found = [measure(_outline(recipe, times), objective, batch) for times in runs]
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return None
    last, more = found[-1], repeat - runs[-1]
    return Activations(
        last.peak + more * (last.peak - found[0].peak), last.held + more * (last.held - found[0].held), last.logits
    )


def _outline(recipe: Recipe, repeat: int) -> zoo.Model:
    """The recipe's model on the meta device, in the precision that it trains in."""
    with torch.device("meta"):
        model = zoo.build(
            "model",
            recipe.model.model_copy(update={"repeat": repeat}),
            activation_checkpointing=recipe.train.activation_checkpointing,
            seed=None,
        )
    return model.to(DTYPES[recipe.train.precision])


def measure(model: zoo.Model, objective: zoo.Objective, batch: Batch) -> Activations:
    """What forward and backward of a batch hold on the model's device, the batch itself included.

    Args:
        batch: on the host.
    """
    model.train()
    counts, device = objective.counts(batch), model.norm.weight.device
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_forget)
    if device.type == "meta":
        batch = dataclasses.replace(batch, context=_Nominal.of(batch.context))
    with StorageMeter([*model.parameters(), *model.buffers()]) as meter, _FusedNorm():
        trace = Trace()
        sums = objective(model, batch.under(trace=trace).to(device))
        loss = objective.combine(sums, counts)
        loss = loss + sum((total for total, _ in trace.losses.values()), loss.new_zeros(()))
        held = meter.now
        loss.backward()
    logits = batch.tokens.numel() * model.head.weight.shape[0] * 4
    return Activations(meter.peak, held, logits)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


class _Nominal(TokenContext):
    """A context without values: of what a router keeps it says that there is as much of each modality as before."""

    @classmethod
    def of(cls, context: TokenContext) -> _Nominal:
        return cls(**{field.name: getattr(context, field.name) for field in dataclasses.fields(context)})

    def kept(self, keep: Tensor, row_counts: tuple[int, ...] | None = None, counts: Counts | None = None) -> Kept:
        """As in a row of which everything is kept, where it is not known how much is."""
        taken = zip(row_counts or self.row_counts, self.counts, strict=True)
        nominal = (tuple(-(-n * kept // max(1, sum(row))) for n in row) for kept, row in taken)
        return Kept.of(counts or tuple(nominal))


class _FusedNorm(TorchFunctionMode):
    """RMSNorm as a GPU has it, which keeps its input and a number a row; without values torch takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.rms_norm and args[0].is_meta:
            return torch._fused_rms_norm(*args, **(kwargs or {}))[0]
        return func(*args, **(kwargs or {}))


def batch_of(recipe: Recipe) -> Batch:
    """A micro-batch of full rows, on the host: documents of an item of each modality and as much text before it."""
    names, length, rows = list(recipe.model.modalities), recipe.data.sequence_length, recipe.train.micro_batch
    modality, document, item = ([] for _ in range(3))
    text = names.index(next(name for name, kind in recipe.modalities.items() if kind.positions is None))
    sizes = {names.index(name): kind.positions.most for name, kind in recipe.modalities.items() if kind.positions}
    number = 0
    while len(modality) < length:
        for m, size in (sizes or {text: length}).items():
            modality += [text] * size + [m] * size
            inside = number if recipe.modalities[names[m]].bidirectional else -1
            item += [-1] * size + [inside] * size
            document += [number] * (2 * size)
            number += 1
    columns = [torch.tensor(column[:length]).expand(rows, -1).contiguous() for column in (modality, document, item)]
    context = TokenContext.from_modality(
        columns[0], columns[1], item=columns[2] if recipe.bidirectional else None, modalities=tuple(names)
    )
    content = {}
    for name in recipe.model.own_stems:
        empty = nothing(recipe.modalities[name].carries)
        content[name] = empty.new_zeros(context.totals[names.index(name)], *empty.shape[1:])
    return Batch(torch.zeros(context.shape, dtype=torch.int64), context, content)
