"""How long a step takes, from a stated model; an estimate, nothing is run.

- *Compute*: training FLOPs of a rank's rows (3 × forward, 4 × with full checkpointing; routers and auxiliary
  routers too) at `efficiency` times the accelerator's peak. Published trainings reach 0.3 to 0.45.
- *Optimizer*: it moves UPDATE_BYTES a parameter of its share through the memory.
- *Communication*: what a rank sends in ring collectives, see `traffic`, over the link inside a node. Where there are
  several nodes a ring leaves each of them once, so that as many bytes as a rank sends leave it over its network, and
  the slower of the two decides.
- A share `overlap` of the compute hides communication: step = compute + optimizer + max(0, communication − overlap ·
  compute).

Left out: loading of data, evaluations, checkpoints, stragglers, failures.
"""

from __future__ import annotations

import dataclasses

from pretrain.recipe import Recipe
from tools.plan.accelerators import Accelerator
from zoo.flops import TRAINING_FACTOR
from zoo.model import Model

EFFICIENCY, OVERLAP = 0.4, 0.7
UPDATE_BYTES = 30
"""AdamW reads a gradient, and reads and writes a weight and two moments in fp32, then writes a weight in bf16."""
ELEMENT = {"fp32": 4, "bf16": 2}
DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step of all ranks; seconds."""

    tokens: int
    """Positions of its rows; padding counts."""
    compute: float
    optimizer: float
    communication: float
    seconds: float
    """The whole, with what of communication is not hidden."""
    bytes_sent: float
    """Bytes that a rank sends."""
    utilisation: float
    """Model FLOPs of the step over what the accelerators could do in it; recomputation counts nothing."""

    def days(self, tokens: float) -> float:
        """Days for so many tokens."""
        return tokens / self.tokens * self.seconds / DAY


def flops_per_token(recipe: Recipe, model: Model) -> float:
    """Training FLOPs a token, routers too, without recomputation: the mean over modalities, by `data.token_ratio` where
    the recipe says it, else of all alike."""
    names = recipe.model.modalities
    cost = model.cost(recipe.data.sequence_length).expand(len(names))
    ratio = recipe.data.token_ratio or {}
    share = [ratio.get(name, 0.0 if ratio else 1.0) for name in names]
    each = [sum(parts) for parts in zip(cost.flops, cost.router, cost.auxiliary, strict=True)]
    return TRAINING_FACTOR * sum(s * f for s, f in zip(share, each, strict=True)) / sum(share)


def traffic(parameters: int, stage: int, ranks: int, passes: int, element: int) -> float:
    """Bytes that a rank sends in a step under a ZeRO stage, by ring collectives in which a rank sends (N − 1) / N of
    what is gathered or reduced, and twice that in an all-reduce.

    Args:
        passes: micro-batches of a rank. Stages 0 and 1 reduce gradients once a step, 2 and 3 in every pass; stage 3
            gathers weights for every forward and backward pass, 1 and 2 once after the update.
        element: bytes of a weight, and of a gradient on its way.
    """
    whole = parameters * element * (ranks - 1) / ranks
    return whole * {0: 2, 1: 2, 2: passes + 1, 3: 3 * passes}[stage]


def estimate(
    recipe: Recipe,
    model: Model,
    accelerator: Accelerator,
    ranks: int,
    stage: int,
    efficiency: float = EFFICIENCY,
    overlap: float = OVERLAP,
) -> Step:
    """A step of the recipe on `ranks` accelerators.

    Args:
        model: of the recipe, on the meta device.
        stage: of ZeRO.
        efficiency: share of the peak that products reach.
        overlap: share of the compute that can hide communication.
    """
    train = recipe.train
    tokens = train.global_batch * recipe.data.sequence_length
    parameters = sum(p.numel() for p in model.parameters())
    peak, element = accelerator.flops[train.precision], ELEMENT[train.precision]
    flops = flops_per_token(recipe, model) * tokens / ranks
    full = train.activation_checkpointing is True  # the selective one computes only again what is cheap
    recomputed = (TRAINING_FACTOR + 1) / TRAINING_FACTOR if full else 1.0
    compute = flops * recomputed / (peak * efficiency)
    optimizer = UPDATE_BYTES * parameters / (ranks if stage else 1) / accelerator.bandwidth
    passes = train.global_batch // (train.micro_batch * ranks)
    sent = traffic(parameters, stage, ranks, passes, element)
    slowest = accelerator.link if ranks <= accelerator.node else min(accelerator.link, accelerator.network)
    communication = sent / slowest
    seconds = compute + optimizer + max(0.0, communication - overlap * compute)
    return Step(tokens, compute, optimizer, communication, seconds, sent, flops / seconds / peak)
