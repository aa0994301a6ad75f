"""Calibration: set the thresholds of auxiliary routers so that causal routing takes as many tokens as training did.

An auxiliary router says yes where its logit is above 0, and how often it does is left open: where it is unsure it says
the likelier thing, so a capacity below one half tends to be undershot. A threshold at the right quantile of the logits
makes the causal load that of top-k. Which tokens are preferred, and the main model, do not change.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from zoo.auxiliary import AuxiliaryRouter
from zoo.batch import Batch
from zoo.config import UserError
from zoo.context import CAUSAL, TOPK
from zoo.routing.statistics import RoutingStatistics
from zoo.trace import Trace

Batches = Sequence[Batch]
"""Gone through several times."""

Run = Callable[[nn.Module, Batch], Any]
"""Runs the model on a batch; what it returns is not looked at."""


def run_plainly(model: nn.Module, batch: Batch) -> Any:
    """The model on what the batch has."""
    return model(batch.tokens, batch.context, content=batch.content)


@dataclasses.dataclass(frozen=True)
class Shares:
    """How much of a block's tokens pass, once it is calibrated."""

    training: float
    """Share that top-k takes."""
    causal: float
    """Share above the threshold in the last causal pass."""


@torch.no_grad()
def calibrate(
    model: nn.Module, batches: Batches, run: Run = run_plainly, passes: int | None = None
) -> dict[str, Shares]:
    """Set the thresholds of all auxiliary routers of `model` on given data; the model is run in evaluation mode.

    A router sees what the routers before it let pass, so every pass under causal routing settles at least the next one;
    after as many passes as there are routers nothing moves any more, and usually after a few.

    Args:
        batches: data like that of training, on the model's device, with the rows and scope sizes of training.
        run: how training runs the model on a batch; an objective that mixes noise in is one.
        passes: at most so many causal passes over the data; default: until nothing moves.
    Returns:
        Block (or block and modality) → shares, which are equal to within one token an expert where logits do not tie
        and `passes` sufficed.
    Raises:
        UserError: the model has no auxiliary routers.
    """
    routers = [module for module in model.modules() if isinstance(module, AuxiliaryRouter)]
    if not routers:
        raise UserError("calibrate: the model has no auxiliary routers; nothing decides by a threshold")
    was_training = model.training
    model.eval()
    try:
        wanted = _training_shares(model, batches, run)
        for _ in range(len(routers) + 1 if passes is None else passes):
            logits = _causal_logits(model, routers, batches, run)
            thresholds = [_thresholds(router, parts, wanted) for router, parts in zip(routers, logits, strict=True)]
            settled = all(map(torch.equal, thresholds, [router.threshold for router in routers]))
            for router, threshold in zip(routers, thresholds, strict=True):
                router.threshold = threshold
            if settled:
                break
    finally:
        model.train(was_training)
    result = {}
    for router, parts in zip(routers, logits, strict=True):
        for name, part, threshold in zip(router.names, parts, router.threshold.cpu(), strict=True):
            if name in wanted and part.numel():
                result[name] = Shares(float(wanted[name]), float((part > threshold).double().mean()))
    return result


def threshold_for(logits: Tensor, share: Fraction) -> float:
    """The number above which as nearly as possible `share` of `logits` (n,) lie, n at least 1.

    Half way between two neighbours, so that a last bit decides nothing; equal logits fall on one side together.
    """
    values, counts = logits.sort(descending=True).values.unique_consecutive(return_counts=True)
    above = [0, *counts.cumsum(0).tolist()]  # above[j]: how many are among the j largest values
    best = min(range(len(above)), key=lambda j: abs(above[j] - share * logits.numel()))
    if best == 0:
        return float(values[0])
    if best == len(values):
        return float(values[-1]) - 1.0
    lower, upper = values[best], values[best - 1]
    middle = (lower + upper) / 2
    return float(middle if middle < upper else lower)


def _training_shares(model: nn.Module, batches: Batches, run: Run) -> dict[str, Fraction]:
    """Share of its candidates that every routed group takes by top-k."""
    statistics = RoutingStatistics()
    for batch in batches:
        trace = Trace()
        run(model, batch.under(routing=TOPK, trace=trace))
        statistics += trace.statistics
    return {name: Fraction(int(hits.chosen), int(hits.total)) for name, hits in statistics.hits.items() if hits.total}


def _causal_logits(model: nn.Module, routers: list[AuxiliaryRouter], batches: Batches, run: Run) -> list[list[Tensor]]:
    """For each router and each of its groups all logits (n, outputs) met under causal routing, on the host."""
    seen: list[list[list[Tensor]]] = [[[] for _ in router.names] for router in routers]
    with _listening(routers, seen):
        for batch in batches:
            run(model, batch.under(routing=CAUSAL, trace=None))
    empty = [torch.empty(0, router.threshold.shape[1]) for router in routers]
    return [[torch.cat([none, *parts]) for parts in groups] for none, groups in zip(empty, seen, strict=True)]


@contextlib.contextmanager
def _listening(routers: list[AuxiliaryRouter], seen: list[list[list[Tensor]]]) -> Iterator[None]:
    """While this lasts every call of a router adds its logits, before the threshold, to `seen[router][group]`."""

    def hook(groups: list[list[Tensor]]) -> Callable[[AuxiliaryRouter, tuple, Tensor], None]:
        def listen(router: AuxiliaryRouter, inputs: tuple, output: Tensor) -> None:
            x, sizes = inputs if len(inputs) == 2 else (inputs[0], (inputs[0].shape[0],))
            for group, part in zip(groups, router.logits(x).float().cpu().split(list(sizes)), strict=True):
                group.append(part)

        return listen

    handles = [router.register_forward_hook(hook(groups)) for router, groups in zip(routers, seen, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _thresholds(router: AuxiliaryRouter, parts: list[Tensor], wanted: dict[str, Fraction]) -> Tensor:
    """(groups, outputs) on the router's device; a group without tokens keeps what it had."""
    result = router.threshold.clone()
    for group, (name, part) in enumerate(zip(router.names, parts, strict=True)):
        if name in wanted and part.numel():
            for output, column in enumerate(part.unbind(1)):
                result[group, output] = threshold_for(column, wanted[name])
    return result
