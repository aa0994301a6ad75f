"""Validation loss by modality, under top-k and under causal routing, and how well the causal routers do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from pretrain.data import Mixture, micro_batches
from pretrain.document_losses import ByDocument
from pretrain.process_group import ALONE, Ranks
from pretrain.sums import Counts, Sums, Totals, by_source
from zoo.auxiliary import RoutedBlock
from zoo.batch import Batch
from zoo.context import CAUSAL, TOPK
from zoo.model import Model
from zoo.routing.statistics import RoutingStatistics
from zoo.slots import Objective
from zoo.trace import Trace


@dataclasses.dataclass(frozen=True)
class StepCounts(Counts):
    """What batches of packed rows hold."""

    terms: tuple[int, ...]
    """Terms of each part of the loss, in the objective's order."""
    tokens: tuple[int, ...]
    """Tokens of each modality, in the model's order."""

    def by_part(self, objective: Objective) -> dict[str, int]:
        """`terms` by the names of the parts."""
        return dict(zip(objective.parts, self.terms, strict=True))


def count_batches(objective: Objective, modalities: Sequence[str], batches: Sequence[Batch]) -> StepCounts:
    """What `batches` hold together; zeros where there are none.

    Args:
        modalities: of the model.
    """
    terms = [objective.counts(batch) for batch in batches]
    return StepCounts(
        tuple(sum(counts[name] for counts in terms) for name in objective.parts),
        tuple(sum(batch.context.totals[m] for batch in batches) for m in range(len(modalities))),
    )


def routings(model: nn.Module) -> tuple[str, ...]:
    """What a model is evaluated under: one without routers that look ahead is causal as it is, another needs its
    auxiliary routers."""
    blocks = [m for m in model.modules() if isinstance(m, RoutedBlock) and m.looks_ahead]
    if not blocks:
        return (CAUSAL,)
    causal = all(block.auxiliary is not None for block in blocks)
    return (TOPK, CAUSAL) if causal else (TOPK,)


@torch.no_grad()
def evaluate(
    forward: nn.Module,
    model: Model,
    objective: Objective,
    stream: Mixture,
    rows: int,
    micro_batch: int,
    ranks: Ranks = ALONE,
    device: torch.device | str = "cpu",
    bits_per_byte: bool = False,
    by_document: Path | None = None,
) -> dict[str, float]:
    """Mean loss of each modality over the first `rows` rows of a stream; collective.

    Args:
        forward: what is called as the model (the engine's wrapper, or the model itself), in evaluation mode.
        model: for its blocks and their cost; may be on the meta device.
        micro_batch: rows a forward pass on one rank.
        ranks: over which the rows are dealt out, the same number of batches to each.
        device: of the weights.
        by_document: file for the losses of each document, causal where the model has it; see `document_losses`.
        bits_per_byte: report the loss of text in bits a byte, too.
    Returns:
        `eval/<routing>/loss`, `…/loss/<modality>` in nats a target token; of several sources `…/source/<source>`, the
        mean over the positions of one; where asked for, `…/bits_per_byte`, the loss
        of all text tokens, special ones too, over the UTF-8 bytes of the texts, which compares tokenizers; for sparse
        models, from the top-k pass, `eval/auxiliary/{accuracy,precision,recall,always_skip}` over all routers
        and `eval/auxiliary/<block>/…` of each, and from the causal pass `eval/causal/flops_per_token` really used,
        beside `eval/nominal_flops_per_token`; of each routed block `eval/<routing>/router/<block>/{load/<modality>,
        entropy,specialisation}`, see `zoo.routing.statistics.Usage`.
    """
    rows = min(rows, stream.rows_per_epoch)
    chunk = micro_batch * ranks.world
    padded = -(-rows // chunk) * chunk
    batches = micro_batches(stream, range(padded), micro_batch, ranks, end=rows)
    counts = count_batches(objective, model.modalities, batches).over(ranks, device)
    batches = [batch.to(device) for batch in batches]
    result: dict[str, float] = {}
    text, text_bytes = stream.vocabulary.text, stream.text_bytes(range(rows)) if bits_per_byte else 0.0
    training = objective.training
    objective.eval()
    for routing in routings(model):
        documents = None
        if by_document is not None and routing == routings(model)[-1]:
            documents = ByDocument(stream, rows, ranks.rank * len(batches) * micro_batch)
        totals = _pass(forward, objective, batches, routing, documents, len(stream.streams)).over(ranks, device)
        if documents is not None:
            losses = documents.over(ranks, objective.parts, device)
            if ranks.first and by_document is not None:
                losses.save(by_document)
        result |= _losses(totals, counts, routing, objective)
        for source, loss in zip(stream.streams, totals.sources, strict=False):
            result |= {} if loss is None else {f"eval/{routing}/source/{source}": loss}
        for block, usage in totals.routing.usage.items():
            found = usage.summary(model.modalities)
            result |= {f"eval/{routing}/router/{block}/{key}": value for key, value in found.items()}
        if text in totals.parts and text_bytes:
            result[f"eval/{routing}/bits_per_byte"] = totals.parts[text] / math.log(2) / text_bytes
        if routing == TOPK:
            result |= _foresight(totals.routing)
        elif shares := totals.routing.shares():
            used, nominal = (model.cost(stream.sequence_length, loads).flops for loads in (shares, None))
            result["eval/causal/flops_per_token"] = _mean(used, counts.tokens)
            result["eval/nominal_flops_per_token"] = _mean(nominal, counts.tokens)
    objective.train(training)
    return result


def validation_loss(values: Mapping[str, float]) -> float:
    """The one number a checkpoint is judged by: the causal loss, or the top-k one of a model without causal routers."""
    return values.get("eval/causal/loss", values.get("eval/topk/loss", float("inf")))


def _pass(
    forward: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    routing: str,
    documents: ByDocument | None,
    sources: int,
) -> Sums:
    """What this rank's batches give under one routing, summed in fp64 on the host; `documents` gets its terms."""
    sums = Sums()
    for batch in batches:
        trace = Trace(detailed=True, terms=None if documents is None and sources == 1 else {})
        parts = objective(forward, batch.under(routing=routing, trace=trace))
        if documents is not None and trace.terms is not None:
            documents.add(batch, trace.terms)
        sums += Sums(
            parts={name: total.double().cpu() for name, total in parts.items()},
            routing=trace.statistics,
            sources=by_source(trace.terms, batch, sources),
        )
    return sums


def _foresight(routing: RoutingStatistics) -> dict[str, float]:
    """How well auxiliary routers foresee what is chosen: all together, and each by the name of its block."""
    rates = {f"eval/auxiliary/{key}": value for key, value in routing.all_hits().rates().items()}
    for name, hits in routing.hits.items():
        rates |= {f"eval/auxiliary/{name}/{key}": value for key, value in hits.rates().items()}
    return rates


def _losses(totals: Totals, counts: StepCounts, routing: str, objective: Objective) -> dict[str, float]:
    terms = counts.by_part(objective)
    sums = {name: torch.tensor(value, dtype=torch.float64) for name, value in totals.parts.items()}
    losses = {f"eval/{routing}/loss": float(objective.combine(sums, terms))}
    means = objective.report(totals.parts, terms, training=False)
    return losses | {f"eval/{routing}/loss/{name}": value for name, value in means.items()}


def _mean(values: Sequence[float], counts: Sequence[int]) -> float:
    return sum(v * c for v, c in zip(values, counts, strict=True)) / max(sum(counts), 1)
