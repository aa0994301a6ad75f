"""Activation checkpointing: what a layer computed is forgotten and computed again when the backward pass needs it.

Never changes results. Routers are not asked again: their decisions are replayed (`Trace.replay`), and noise is a
function of the tokens.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from zoo.context import TokenContext
from zoo.slots import Component, Part

Recompute = bool | Literal["selective"]
"""False: keep what the backward pass needs. True: keep what enters a layer, and compute all else again. "selective":
also keep what is dear to compute, `DEAR`; norms, gates, rotary embedding and gathers are computed again."""

DEAR = {
    *("mm", "addmm", "bmm", "baddbmm", "_grouped_mm"),
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
}
"""Torch's operations whose results "selective" keeps. What is no operation of torch's (flex_attention once compiled,
xformers, mamba-ssm's scan) runs again, and so do products that are written into a part of a larger tensor, those with
weights untied by modality."""


def recomputed(layer: Component, x: Tensor, context: TokenContext, selective: bool = False) -> Tensor:
    """The layer's output; x is kept, and what `selective` says; the backward pass computes the rest again.

    Args:
        context: with a trace.
    """
    assert context.trace is not None
    # taken out by the first pass: the trace's losses hold the autograd graph, so the graph must not hold the trace
    first = [context]
    again = context.replace(trace=context.trace.replay())

    def run(x: Tensor) -> Tensor:
        return layer(x, first.pop() if first else again)

    contexts = _keep_and_give if selective else noop_context_fn
    random = not counter_noise_alone(layer)
    return checkpoint(run, x, use_reentrant=False, preserve_rng_state=random, context_fn=contexts)


Results = dict[Any, collections.deque[Any]]
"""What dear operations gave, first in first out, by operation and the shapes of its operands."""


def _keep_and_give() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Contexts for the first pass, which keeps the results of dear operations, and for the second, which has them.

    Torch's own selective checkpointing counts every call of an operation, and would give wrong results where the second
    pass leaves out what only a router's decision or a statistic needed. Here a call counts if it is part of the
    gradient's graph, and those are the same in both passes.
    """
    results: Results = collections.defaultdict(collections.deque)

    def keep(key: Any, compute: Callable[[], Any]) -> Any:
        result = compute()
        results[key].append(tree_map_only(torch.Tensor, torch.Tensor.detach, result))
        return result

    def give(key: Any, compute: Callable[[], Any]) -> Any:
        return results[key].popleft()

    return _Dear(keep), _Dear(give)


class _Dear(TorchDispatchMode):
    """Hands every dear operation that is part of the gradient's graph to `treat`, with what it is known by."""

    def __init__(self, treat: Callable[[Any, Callable[[], Any]], Any]) -> None:
        super().__init__()
        self.treat = treat

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def compute() -> Any:
            return func(*args, **(kwargs or {}))

        if func.namespace != "aten" or func._opname not in DEAR or func._overloadname == "out":
            return compute()
        operands = [value for value in args if isinstance(value, Tensor)]
        if not torch.is_grad_enabled() or not any(value.requires_grad for value in operands):
            return compute()
        return self.treat((func, *(value.shape for value in operands)), compute)


def counter_noise_alone(layer: Component) -> bool:
    """Whether a recomputation of the layer draws the same noise without torch's random state; blocks say so."""
    return all(part.counter_noise for part in layer.modules() if isinstance(part, Part))
