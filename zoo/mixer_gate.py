"""MixER's gate: a linear top-1 router fitted by k-means and least squares instead of by gradients (arXiv 2502.05335).

Every `refit_every` steps, from step 0 on, all tokens of the step (all ranks and micro-batches) give their features:

1. each is assigned to the nearest of E centroids; before the first fit, to the expert that the random first gate sends
   it to;
2. each centroid moves to the mean of its tokens (one Lloyd step a refit, so k-means converges over refits); a centroid
   without tokens splits the fullest cluster;
3. the gate, an affine map, becomes the ridge regression of the one-hot assignment of (1) on the features.

A token goes to the expert with the largest score. Neither the gate nor its input gets a gradient; experts train as
ever. The published schedule and initialisation are not given in full: the choices here are this project's.

Cost: a step that refits adds 2 D (D + E) FLOPs a token, D / 3F of an expert's forward pass, and a solve of size D on
the host; the other steps add nothing.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from zoo.config import ConfigError
from zoo.context import TokenContext
from zoo.registry import BlockConfig, Place, register
from zoo.routing.candidates import Candidates
from zoo.routing.chooser import TokenChoice
from zoo.routing.scorer import Router
from zoo.routing.selection import ExpertSelection


@register("router", "mixer")
class MixerGate(Router, counter_noise=True):
    """scores = W [features, 1]; W, and the centroids it is fitted to, are fp32 kept as bits in integer buffers."""

    class Config(BlockConfig):
        refit_every: int = Field(100, gt=0)
        """Steps from one refit to the next."""
        context: Literal["token", "document"] = "token"
        """What the gate looks at: the token's own vector, or the mean over its document up to it, of the tokens that
        belong to the group (under `moma` those of its modality)."""
        weight: Literal["one", "probability"] = "one"
        """What multiplies the expert's output: 1, or the softmax of the scores, a constant for the gradient."""
        ridge: float = Field(1e-3, gt=0)
        """Ridge penalty of the least squares, in units of the features' mean square; the intercept is free."""

    gate_bits: Tensor
    centroid_bits: Tensor
    refits: Tensor

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        super().__init__()
        self.name, self.outputs, self.width = place.name, outputs, place.d_model
        self.chooser = TokenChoice(1, outputs)
        self.refit_every, self.ridge = config.refit_every, config.ridge
        self.pooled, self.probability = config.context == "document", config.weight == "probability"
        for name, width in (("gate_bits", place.d_model + 1), ("centroid_bits", place.d_model)):
            self.register_buffer(name, torch.zeros(outputs, width, dtype=torch.int32))
        self.register_buffer("refits", torch.zeros((), dtype=torch.int64))
        first = _directions(zlib.crc32(place.name.encode()), outputs, place.d_model)
        _store(self.gate_bits, F.pad(first, (0, 1)))

    @classmethod
    def check_experts(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        if noop:
            raise ConfigError(
                f"{path}.type: 'mixer' with noop_experts: {noop}; its gate is fitted to clusters of tokens, and no "
                "gradient says which tokens can do without an expert: set noop_experts: 0, or type: token_choice"
            )

    @property
    def gate(self) -> Tensor:
        """(E, D + 1) fp32, the intercept last."""
        return self.gate_bits.view(torch.float32)

    @property
    def centroids(self) -> Tensor:
        """(E, D) fp32."""
        return self.centroid_bits.view(torch.float32)

    @property
    def weights(self) -> int:
        return self.gate_bits.numel()

    def init_state(self, rows: int, like: Tensor) -> PrefixState | None:
        return PrefixState.empty(rows, self.width, like.device) if self.pooled else None

    def forward(self, x: Tensor, candidates: Candidates | None = None, state: PrefixState | None = None) -> Tensor:
        """As a scorer's. Without candidates x are the features themselves."""
        features = x.detach().to(_wide(x)) if candidates is None else self._features(x, candidates, state)
        gate = self.gate.to(features.dtype)
        return F.linear(features, gate[:, :-1], gate[:, -1])

    def _features(self, x: Tensor, candidates: Candidates, state: PrefixState | None = None) -> Tensor:
        """(n, D), detached, fp32 or float64."""
        x = x.detach().to(_wide(x))
        return prefix_means(x, candidates, state) if self.pooled else x

    def gates(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) if self.probability else torch.ones_like(scores)

    def observe(self, x: Tensor, scores: Tensor, selection: ExpertSelection, candidates: Candidates) -> None:
        context = candidates.context
        assert isinstance(context, TokenContext)
        if context.trace is None or context.trace.replaying or not self.training or context.step % self.refit_every:
            return
        features = self._features(x, candidates)
        centroids = self.centroids.to(features)
        nearest = (centroids.square().sum(1) - 2 * features @ centroids.T).argmin(1)
        nearest = torch.where(self.refits > 0, nearest, scores.argmax(1))
        assigned = F.one_hot(nearest, self.outputs).to(features)
        features = F.pad(features, (0, 1), value=1.0)
        context.trace.add_update(self.name, {"gram": features.T @ features, "moment": assigned.T @ features})

    def update(self, statistics: Mapping[str, Tensor], step: int) -> None:
        """Refit, where the step collected for it and had tokens.

        Args:
            statistics: with [f, 1] the features of a token and a its one-hot assignment, `gram` Σ [f, 1] [f, 1]ᵀ
                (D + 1, D + 1) and `moment` Σ a [f, 1]ᵀ (E, D + 1).
        """
        if "gram" not in statistics:
            return
        gram, moment = (statistics[key].detach().double().cpu() for key in ("gram", "moment"))
        if gram[-1, -1] > 0:
            _store(self.centroid_bits, lloyd_step(self.centroids.double().cpu(), moment))
            _store(self.gate_bits, ridge_regression(gram, moment, self.ridge))
            self.refits += 1


def lloyd_step(centroids: Tensor, moment: Tensor) -> Tensor:
    """(E, D) centroids moved to the means of their tokens.

    One without tokens and the fullest one (the next for the next) become the fullest one's mean plus and minus a small
    fixed vector, so that the next assignment cuts that cluster in two.

    Args:
        moment: (E, D + 1), sums of each cluster's tokens, their number last.
    """
    count = moment[:, -1]
    moved = torch.where(count[:, None] > 0, moment[:, :-1] / count.clamp_min(1)[:, None], centroids)
    empty = (count == 0).nonzero()[:, 0].tolist()
    fullest = count.sort(descending=True, stable=True).indices.tolist()
    for cluster, full in zip(empty, fullest, strict=False):
        if count[full] > 1:
            size = 1e-3 * float(moved[full].norm().clamp_min(1e-6))
            step = size * F.normalize(_directions(cluster, 1, moved.shape[1])[0].to(moved), dim=0)
            moved[cluster], moved[full] = moved[full] + step, moved[full] - step
    return moved


def ridge_regression(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """(E, D + 1): W that minimises the mean of |a − W [f, 1]|² + ridge · mean(f²) · |W without the intercept|².

    Args:
        gram, moment: float64 sums, as in `MixerGate.update`.
    """
    count = gram[-1, -1]
    size = (gram.diagonal()[:-1].mean() / count).clamp_min(1e-12)
    penalty = torch.full_like(gram[0], ridge) * size
    penalty[-1] = 0.0
    return torch.linalg.solve(gram / count + penalty.diag(), (moment / count).T).T


@dataclasses.dataclass
class PrefixState:
    """Sum and number of what a row's newest document has shown so far."""

    total: Tensor
    """(B, D) float64."""
    count: Tensor
    """(B,) int64, tokens seen so far."""
    document: Tensor
    """(B,) int64; −1 before the first token."""

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> PrefixState:
        count = torch.zeros(rows, dtype=torch.int64, device=device)
        return cls(torch.zeros(rows, width, dtype=torch.float64, device=device), count, count - 1)

    def clone(self) -> PrefixState:
        return PrefixState(self.total.clone(), self.count.clone(), self.document.clone())

    def reorder(self, index: Tensor) -> None:
        self.total, self.count, self.document = self.total[index], self.count[index], self.document[index]


def _wide(x: Tensor) -> torch.dtype:
    """fp32, or float64 for a float64 model."""
    return torch.promote_types(x.dtype, torch.float32)


def prefix_means(x: Tensor, candidates: Candidates, state: PrefixState | None = None) -> Tensor:
    """(n, D): the mean over each token's document up to and with it, among the candidates; sums are float64.

    Args:
        x: (n, D) of the candidates, in row and time order.
        state: what came before; updated in place.
    """
    if not x.shape[0]:
        return x
    context, place = candidates.context, torch.arange(x.shape[0], device=x.device)
    assert isinstance(context, TokenContext)
    row = candidates.index.div(context.modality.shape[1], rounding_mode="floor")
    document = context.document.reshape(-1).index_select(0, candidates.index)
    begins = torch.ones_like(row, dtype=torch.bool)
    begins[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
    start = torch.where(begins, place, 0).cummax(0).values
    sums = x.double().cumsum(0)
    total = sums - F.embedding(start, F.pad(sums[:-1], (0, 0, 1, 0)))
    count = place - start + 1
    if state is not None:
        goes_on = state.document.index_select(0, row) == document
        total = total + goes_on[:, None] * state.total.index_select(0, row)
        count = count + goes_on * state.count.index_select(0, row)
        rows = [b for b, tokens in enumerate(candidates.row_counts) if tokens]
        last = [sum(candidates.row_counts[: b + 1]) - 1 for b in rows]
        state.total[rows], state.count[rows], state.document[rows] = total[last], count[last], document[last]
    return (total / count[:, None]).to(x.dtype)


def _directions(seed: int, count: int, width: int) -> Tensor:
    """(count, width) fp32 normal numbers over √width, a function of the arguments alone, on the CPU."""
    drawn = np.random.default_rng(seed).standard_normal((count, width)) * width**-0.5
    return torch.from_numpy(drawn.astype(np.float32))


def _store(bits: Tensor, value: Tensor) -> None:
    """Write fp32 numbers into an integer buffer; nothing on the meta device."""
    bits.copy_(value.to(torch.float32).contiguous().view(torch.int32))
