"""Upcycling: the weights of a trained model as the first weights of one with more experts or untied weights.

    dense → experts / MoMa      every expert a copy of the dense feed-forward
    1t1i → NtNi                 every expert of a group a copy of the group's one (MoMa, arXiv 2407.21770 §2.4)
    tied → untied               every modality a copy of the shared weight
    block → MoD round it        the block inside is the old one

What has no counterpart (routers of another number of experts, auxiliary routers) keeps its first values; copies of one
expert part ways through the router's noise (`router: {noise: gumbel}`) or its random start. The optimiser starts anew:
moments of one weight say nothing about N copies that see other tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from zoo.config import UserError

_FRESH = re.compile(r"\.(router|auxiliary)\.")
_EXPERT = re.compile(r"(?P<path>.*\.feedforward)\.groups\.(?P<group>[^.]+)\.experts\.(?P<weight>w_in|w_out)$")


@dataclasses.dataclass(frozen=True)
class Upcycled:
    """First weights of the new model, and where each came from."""

    weights: dict[str, Tensor]
    origin: dict[str, str]
    """Name in the new model → name in the old one; absent for what keeps its first value."""


def upcycle(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Upcycled:
    """Fill a new model's weights from an old one's.

    Args:
        old: whole weights of the trained model by name.
        new: whole first weights of the new model by name; gives names, shapes, and what stays fresh.
    Raises:
        UserError: a weight of the new model has no counterpart of a shape it can be copied from.
    """
    weights, origin = {}, {}
    for name, value in new.items():
        found = _counterpart(name, old)
        if _FRESH.search(name) and (found is None or old[found].shape != value.shape):
            # also a router of one expert: N copies of its column would choose the same tokens for all N experts
            weights[name] = value
            continue
        copied = None if found is None else _spread(_as_stored(old[found], value, name, found), value)
        if copied is None:
            raise UserError(_problem(name, value, found, old))
        weights[name], origin[name] = copied.to(value.dtype).clone(), found  # type: ignore[assignment]
    return Upcycled(weights, origin)


def _counterpart(name: str, old: Mapping[str, Tensor]) -> str | None:
    """The old weight that `name` comes from: of the same name, from inside or outside an MoD wrapper, from the dense
    feed-forward that became experts, or from the one group that became several."""
    for candidate in (name, name.replace(".block.", ".", 1), re.sub(r"^(layers\.\d+)\.", r"\1.block.", name)):
        if candidate in old:
            return candidate
        expert = _EXPERT.fullmatch(candidate)
        if expert:
            path, weight = expert["path"], expert["weight"]
            for source in (f"{path}.{weight}.weight", f"{path}.groups.all.experts.{weight}"):
                if source in old:
                    return source
    return None


def _as_stored(source: Tensor, target: Tensor, name: str, found: str) -> Tensor:
    """The old weight `found`, laid out as the new weight `name` is."""
    if _EXPERT.fullmatch(name) and found.endswith(".weight"):
        return source.transpose(-1, -2)  # linear maps are stored (out, in), stacked experts (E, in, out)
    if name.endswith(".dt_bias") and target.shape[0] % source.shape[0] == 0:
        return source.repeat(target.shape[0] // source.shape[0])  # flat, one part a modality
    return source


def _spread(source: Tensor, target: Tensor) -> Tensor | None:
    """`source` in the shape of `target`: as it is, copied along a new first axis, or along one of length 1."""
    if source.shape == target.shape:
        return source
    if source.dim() + 1 == target.dim() and source.shape == target.shape[1:]:
        return source.expand(target.shape)
    if source.dim() == target.dim() and source.shape[0] == 1 and source.shape[1:] == target.shape[1:]:
        return source.expand(target.shape)
    return None


def _problem(name: str, value: Tensor, found: str | None, old: Mapping[str, Tensor]) -> str:
    shape = tuple(value.shape)
    if found is None:
        return f"upcycle: {name} {shape} has no counterpart; the recipes may differ in experts, untying and depth alone"
    return f"upcycle: {name} {shape} cannot be copied from {found} {tuple(old[found].shape)}; keep widths and heads"
