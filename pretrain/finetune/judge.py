"""How well a model answers, and what its decoder does for it: FLOPs, skipped tokens, keys and values."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

import zoo.adapt as za
from pretrain.finetune.asking import ASKING, PromptsOnly
from pretrain.finetune.prompt_batches import Prompts
from pretrain.finetune.routing import routing_sums, skipped
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
    asking = (PromptsOnly if metric is None else ASKING[metric])(model, prompts)
    questions, flops, dense_flops, held, dense_held = 0, 0, 0, 0, 0
    routing, logits = RoutingStatistics(), []
    for batch in prompts.batches:
        trace = Trace()
        cache = asking.read(batch, trace if layers else None)
        questions += len(batch.questions)
        flops += za.traced_flops(model, trace, batch.lengths).total
        dense_flops += sum(n * za.decoder_flops(model, length).total for length, n in Counter(batch.lengths).items())
        held += cache.bytes
        dense_held += cache.dense_bytes
        routing += routing_sums(trace, layers)
        logits += [decision.logits for decision in trace.decisions.values()]
    return {
        **asking.values(),
        "questions": questions,
        "flops": flops / dense_flops,
        "keys_and_values": held / dense_held,
        "skip": skipped(routing),
        "routers": routing.all_hits().rates(),
        "logits": torch.cat(logits) if logits else torch.zeros(0),
    }
