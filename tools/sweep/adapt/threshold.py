"""A threshold in place of top-k: of the routers' probabilities, such that prefills cost what is wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

import zoo.adapt as za
from pretrain.finetune.judge import judge
from pretrain.finetune.prompt_batches import Prompts
from zoo.adapt import AdaptConfig

EDGE = 1e-6
"""Thresholds keep so far from 0 and 1."""


def with_inference(model: nn.Module, **rule: Any) -> nn.Module:
    """Give an adapted model another rule of inference, in place; weights stay."""
    config = za.adaptation(model)
    assert config is not None, "the model is dense"
    weights = {name: router.state_dict() for name, router in za.routers(model)}
    za.restore(model)
    za.adapt(model, AdaptConfig.parse({**config.model_dump(mode="json"), "inference": rule}))
    for name, router in za.routers(model):
        router.load_state_dict(weights[name])
    return model


def tune_threshold(model: nn.Module, prompts: Prompts, target: float, tolerance: float, rounds: int) -> dict[str, Any]:
    """Leave a model with learned routers under the threshold whose measured prefill FLOPs are nearest to the target.

    By false position on the share of the top-k rule's logits that are below it: what a threshold does in one layer
    changes the logits of the next, so each try is a pass.

    Args:
        target: decoder FLOPs over dense.
        tolerance: relative; a try within a quarter of it ends the search.
        rounds: passes at most.
    Returns:
        `threshold`, `flops` on these prompts, and `reached`, whether they are within the tolerance.
    """
    logits = judge(with_inference(model, rule="topk"), prompts, None)["logits"].double().sort().values
    tried: dict[float, float] = {}

    def flops(share: float) -> float:
        where = logits[round(share * (len(logits) - 1))]
        threshold = min(max(float(where.sigmoid()), EDGE), 1 - EDGE)
        if threshold not in tried:
            with_inference(model, rule="threshold", threshold=threshold)
            tried[threshold] = judge(model, prompts, None)["flops"]
        return tried[threshold]

    _search(flops, target, tolerance / 4, rounds)
    threshold = min(tried, key=lambda each: abs(tried[each] - target))
    with_inference(model, rule="threshold", threshold=threshold)
    reached = abs(tried[threshold] / target - 1) <= tolerance
    return {"threshold": threshold, "flops": tried[threshold], "reached": reached}


def _search(value: Callable[[float], float], target: float, tolerance: float, rounds: int) -> None:
    """Try arguments from 0 to 1 of a falling function, by false position, until one comes near the target.

    Args:
        tolerance: relative.
        rounds: calls at most.
    """
    low, high = 0.0, 1.0
    at_low, at_high = value(low), value(high)
    for _ in range(rounds - 2):
        if at_low <= target or at_high >= target:
            break
        slope = (at_low - target) / (at_low - at_high)
        tried = low + (high - low) * min(max(slope, 0.1), 0.9)
        at = value(tried)
        if math.isclose(at, target, rel_tol=tolerance):
            break
        if at > target:
            low, at_low = tried, at
        else:
            high, at_high = tried, at
