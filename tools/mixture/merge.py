"""Mixtures on a grid, and the merged weights that stand for models trained on them; pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tools.mixture.settings import Weights
from zoo.config import UserError

State = Mapping[str, Tensor]
"""Parameters and buffers of a model by dotted name."""


def simplex(names: Sequence[str], parts: int) -> list[Weights]:
    """All mixtures whose weights are multiples of 1 / parts, the first source's weight rising slowest."""
    cuts = itertools.combinations_with_replacement(range(parts + 1), len(names) - 1)
    bounds = [(0, *cut, parts) for cut in cuts]
    return [{n: (b - a) / parts for n, a, b in zip(names, each, each[1:], strict=False)} for each in bounds]


def merged(states: Mapping[str, State], weights: Weights) -> dict[str, Tensor]:
    """Σ w · θ over the models of the sources, in double precision, in the dtype of the models.

    Args:
        states: of the models by source; all of one architecture, trained from one start.
        weights: by source, of sum 1.
    Raises:
        UserError: the models do not have the same tensors, or differ in one that is not of floating point, of which
            there is no mean.
    """
    first, *others = states.values()
    for name, other in zip(list(states)[1:], others, strict=True):
        if {key: value.shape for key, value in other.items()} != {key: value.shape for key, value in first.items()}:
            raise UserError(f"{name}: its model is not that of {next(iter(states))}; only equal ones can be merged")
        for key, value in first.items():
            if not value.is_floating_point() and not torch.equal(value, other[key]):
                raise UserError(
                    f"{name}: {key} differs from that of {next(iter(states))}, and whole numbers have no mean"
                )
    return {key: _mean([(weights[name], state[key]) for name, state in states.items()]) for key in first}


def _mean(terms: Sequence[tuple[float, Tensor]]) -> Tensor:
    value = terms[0][1]
    if not value.is_floating_point():
        return value
    return sum((weight * tensor.double() for weight, tensor in terms), torch.zeros_like(value.double())).to(value.dtype)
