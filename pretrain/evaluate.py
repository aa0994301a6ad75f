"""Validation loss by modality, under top-k and under causal routing, and how well the causal routers do."""

from __future__ import annotations

import collections
from collections.abc import Callable

import torch
from torch import nn

from pretrain.data import TokenStream, micro_batches
from zoo.auxiliary import RoutedBlock
from zoo.context import CAUSAL, TOPK, Trace
from zoo.model import Model
from zoo.routing.statistics import RoutingStatistics

Reduce = Callable[[torch.Tensor], torch.Tensor]


def routings(model: nn.Module) -> tuple[str, ...]:
    """What a model is evaluated under: one without routers that look ahead is causal as it is, another needs its auxiliary
    routers."""
    blocks = [m for m in model.modules() if isinstance(m, RoutedBlock) and m.looks_ahead]
    if not blocks:
        return (CAUSAL,)
    causal = all(block.auxiliary is not None for block in blocks)
    return (TOPK, CAUSAL) if causal else (TOPK,)


@torch.no_grad()
def evaluate(
    forward: nn.Module,
    model: Model,
    objective: nn.Module,
    stream: TokenStream,
    rows: int,
    micro_batch: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    all_reduce_sum: Reduce = lambda tensor: tensor,
) -> dict[str, float]:
    """Mean loss of each modality over the first `rows` rows of a stream.

    Args:
        forward: what is called as the model (the engine's wrapper, or the model itself).
        model: for its blocks and their cost; may be on the meta device.
        all_reduce_sum: sums a tensor over ranks. Every rank takes the same number of batches.
    Returns:
        `eval/<routing>/loss`, `…/loss/<modality>` in nats a target token; for sparse models, from the top-k pass,
        `eval/auxiliary/{accuracy,precision,recall,always_skip}` over all routers and
        `eval/auxiliary/<block>/…` of each, and from the causal pass
        `eval/causal/flops_per_token` really used, beside `eval/nominal_flops_per_token`.
    """
    rows = min(rows, stream.rows_per_epoch)
    chunk = micro_batch * world
    padded = -(-rows // chunk) * chunk
    batches = [b.to(device) for b in micro_batches(stream, 0, padded, micro_batch, rank, world, 0, 0, end=rows)]
    result: dict[str, float] = {}
    for routing in routings(model):
        sums: dict[str, torch.Tensor] = collections.defaultdict(lambda: torch.zeros((), dtype=torch.float64))
        statistics = RoutingStatistics()
        for batch in batches:
            trace = Trace()
            context = batch.context.replace(routing=routing, trace=trace)
            for name, (total, count) in objective(forward, type(batch)(batch.tokens, context)).items():
                sums[f"sum|{name}"] = sums[f"sum|{name}"] + total.double().cpu()
                sums[f"count|{name}"] = sums[f"count|{name}"] + float(count)
            for m, total in enumerate(context.totals):
                sums[f"tokens|{m}"] = sums[f"tokens|{m}"] + total
            statistics += trace.statistics
        names, counted = sorted(sums), statistics.flat(device)  # the same names on every rank, whatever its tokens are
        reduced = all_reduce_sum(torch.cat((torch.stack([sums[name] for name in names]).to(device), counted)))
        totals = dict(zip(names, reduced[: len(names)].tolist(), strict=True))
        statistics = statistics.with_counts(reduced[len(names) :])
        result |= _losses(totals, routing, objective, model.modalities)
        if routing == TOPK:
            result |= {f"eval/auxiliary/{key}": value for key, value in statistics.all_hits().rates().items()}
            for name, hits in statistics.hits.items():
                result |= {f"eval/auxiliary/{name}/{key}": value for key, value in hits.rates().items()}
        elif statistics.shares():
            counts = [totals[f"tokens|{m}"] for m in range(len(model.modalities))]
            length = stream.sequence_length
            result["eval/causal/flops_per_token"] = _mean(model.cost(length, statistics.shares()).flops, counts)
            result["eval/nominal_flops_per_token"] = _mean(model.cost(length).flops, counts)
    return result


def validation_loss(values: dict[str, float]) -> float:
    """The one number a checkpoint is judged by: the causal loss, or the top-k one of a model without causal routers."""
    return values.get("eval/causal/loss", values.get("eval/topk/loss", float("inf")))


def _losses(
    totals: dict[str, float], routing: str, objective: nn.Module, modalities: tuple[str, ...]
) -> dict[str, float]:
    counts = {name: totals[f"count|{name}"] for name in modalities}
    sums = {
        name.removeprefix("sum|"): torch.tensor(value, dtype=torch.float64)
        for name, value in totals.items()
        if name.startswith("sum|")
    }
    result = {f"eval/{routing}/loss": float(objective.combine(sums, counts))}
    for name in modalities:
        if counts[name]:
            result[f"eval/{routing}/loss/{name}"] = totals[f"sum|{name}"] / counts[name]
    return result


def _mean(values: tuple[float, ...], counts: list[float]) -> float:
    return sum(v * c for v, c in zip(values, counts, strict=True)) / max(sum(counts), 1)
