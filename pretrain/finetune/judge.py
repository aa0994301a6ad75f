"""How well a model answers, and what its decoder does for it: FLOPs, skipped tokens, keys and values."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import nn

import zoo.adapt as za
from pretrain.finetune import answers
from pretrain.finetune.asking import ANSWERING, Unasked
from pretrain.finetune.prompt_batches import Prompts
from zoo.adapt import Trace
from zoo.routing.statistics import RoutingStatistics


@torch.no_grad()
def judge(model: nn.Module, prompts: Prompts, metric: str | None = "accuracy") -> dict[str, Any]:
    """Ask a model.

    Args:
        model: in evaluation, dense or adapted.
        metric: "accuracy": it answers, see `asking.Generated`; "perplexity": it is told the answers, see
            `asking.Forced`; None: it only reads the prompts.
    Returns:
        The metric's own values; `questions`, how many;
        `flops`, of the decoder's prefill with its routers, measured, over dense; `keys_and_values`, bytes over dense;
        `skip`, share of candidates skipped in each routed layer, by its name; `routers`, how well they foresee who is
        kept; `logits`, (n,) of all candidates.
    """
    layers = [layer.routing.name for layer in za.routed_layers(model)]
    answering = (Unasked if metric is None else ANSWERING[metric])(model, prompts)
    sums: defaultdict[str, float] = defaultdict(float)
    routing, logits = RoutingStatistics(), []
    for batch in prompts.batches:
        trace = Trace()
        cache = answering.read(batch, trace if layers else None)
        sums["questions"] += len(batch.asked)
        sums["flops"] += za.traced_flops(model, trace, batch.lengths).total
        sums["dense"] += sum(n * za.decoder_flops(model, length).total for length, n in Counter(batch.lengths).items())
        sums["bytes"] += cache.bytes
        sums["dense bytes"] += cache.dense_bytes
        routing += answers.routing_sums(trace, layers)
        logits += [decision.logits for decision in trace.decisions.values()]
    values = answers.routing_values(routing)
    return {
        **answering.values(),
        "questions": sums["questions"],
        "flops": sums["flops"] / sums["dense"],
        "keys_and_values": sums["bytes"] / sums["dense bytes"],
        "skip": {layer: values[f"skip/{layer}"] for layer in layers},
        "routers": {key.partition("/")[2]: value for key, value in values.items() if key.startswith("auxiliary/")},
        "logits": torch.cat(logits) if logits else torch.zeros(0),
    }
