"""Which layers to route, from their ARank: those below a threshold, or the lowest ones until a budget is met.

Layer 0 is never proposed; the last one only when asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from zoo.adapt.flops import layer_flops
from zoo.config import UserError


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What is proposed for one layer, and why."""

    chosen: bool
    reason: str


def by_threshold(ranks: Sequence[float], threshold: float, last_layer: bool = False) -> list[Proposal]:
    """Route every layer whose rank_over_length is below `threshold` (the published rule).

    Args:
        ranks: rank_over_length of each layer.
        last_layer: whether the last one may be taken.
    """
    choices = []
    for layer, rank in enumerate(ranks):
        dense = _stays_dense(layer, len(ranks), last_layer)
        below = rank < threshold
        said = f"rank_over_length {rank:.3f} {'below' if below else 'not below'} threshold {threshold:g}"
        choices.append(dense or Proposal(below, said))
    return choices


def by_budget(
    ranks: Sequence[float], savings: Sequence[float], target: float, goal: str, last_layer: bool = False
) -> list[Proposal]:
    """Route the layers of lowest rank_over_length, as few as save `target` together.

    Args:
        ranks: rank_over_length of each layer; of equal ones the deeper layer is taken first.
        savings: what routing each layer saves; see `skip_savings` and `flops_savings`.
        target: the sum to reach.
        goal: says it in words, for reasons and errors: "skip ratio 0.3 at capacity 0.5".
    Raises:
        UserError: all layers together do not reach it.
    """
    depth = len(ranks)
    allowed = [layer for layer in range(depth) if _stays_dense(layer, depth, last_layer) is None]
    order = sorted(allowed, key=lambda layer: (ranks[layer], -layer))
    taken, total = [], 0.0
    for layer in order:
        if total >= target * (1 - 1e-9):
            break
        taken.append(layer)
        total += savings[layer]
    if total < target * (1 - 1e-9):
        raise UserError(
            f"{goal}: needs a saving of {target:.3f}, but all {len(order)} layers that may be routed save {total:.3f}; "
            "keep less in each, or ask for less"
        )
    choices = []
    for layer, rank in enumerate(ranks):
        dense = _stays_dense(layer, depth, last_layer)
        place = order.index(layer) + 1 if dense is None else 0
        if dense is not None:
            choices.append(dense)
        elif place <= len(taken):
            said = f"rank_over_length {rank:.3f} is number {place} from below; {goal} takes the lowest {len(taken)}"
            choices.append(Proposal(True, said))
        else:
            highest = max((ranks[other] for other in taken), default=0.0)
            said = f"rank_over_length {rank:.3f}: {goal} is met by {len(taken)} layers of up to {highest:.3f}"
            choices.append(Proposal(False, said))
    return choices


def skip_savings(depth: int, capacity: float) -> list[float]:
    """Share of all (image token, layer) pairs that are skipped by routing each layer.

    Args:
        capacity: share of image tokens that a routed layer keeps.
    """
    return [(1 - capacity) / depth] * depth


def flops_savings(
    layers: Sequence[Mapping[str, Any]], tokens: Sequence[int], image_tokens: Sequence[int], capacity: float
) -> list[float]:
    """Share of the dense decoder's prefill FLOPs that routing each layer saves, over the measured samples.

    Counted as `zoo.adapt.flops` does, routers apart.

    Args:
        layers: `weights` and `width` of each, as `arank.Measurement.layers` gives them.
        tokens, image_tokens: of each sample.
        capacity: share of image tokens that a routed layer keeps.
    """

    def flops(layer: Mapping[str, Any], lengths: Sequence[float]) -> float:
        return sum(layer_flops(layer["weights"], layer["width"], length) for length in lengths)

    kept = [s - (1 - capacity) * images for s, images in zip(tokens, image_tokens, strict=True)]
    dense = [flops(layer, tokens) for layer in layers]
    total = sum(dense)
    return [(whole - flops(layer, kept)) / total for layer, whole in zip(layers, dense, strict=True)]


def _stays_dense(layer: int, depth: int, last_layer: bool) -> Proposal | None:
    if layer == 0:
        return Proposal(False, "kept dense: layer 0 alone holds keys and values of every token")
    if layer == depth - 1 and not last_layer:
        return Proposal(False, "kept dense: the last layer's router gets next to no gradient; not asked for")
    return None
