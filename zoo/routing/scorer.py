"""Scorers: what gives every candidate a score for each output; and routers, which choose by their scores as well."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from zoo.place import BlockConfig
from zoo.routing.candidates import Candidates
from zoo.routing.chooser import Chooser
from zoo.routing.selection import ExpertSelection
from zoo.slots import Part
from zoo.states import State


class Scorer(Part):
    """Base of what stands in a slot `router`: scores each token by itself. Built as `cls(config, place, outputs)`.

    An output is an expert (the last ones may be no-op experts), or the one layer of Mixture-of-Depths. A subclass gives
    `forward`, and overrides the rest where it differs. Whoever uses a scorer chooses by expert choice.
    """

    @classmethod
    def check_experts(cls, config: BlockConfig, experts: int, noop: int, path: str) -> None:
        """Raise `ConfigError` where it cannot score for `experts` and `noop` no-op experts.

        Args:
            config: of the scorer.
            path: its dotted key.
        """

    @classmethod
    def check_depth(cls, config: BlockConfig, path: str) -> None:
        """Raise `ConfigError` where it cannot score for the one output of Mixture-of-Depths; as `check_experts`."""

    @property
    def weights(self) -> int:
        """Weights that scoring one token meets, for `cost`."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, x: Tensor, candidates: Candidates | None = None) -> Tensor:
        """Tokens x (n, D) → scores (n, outputs), fp32 (float64 for a float64 model).

        Args:
            candidates: what there is to know about the tokens besides, such as keys for noise; None: no noise.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward(x, candidates=None)")

    def ranking(self, scores: Tensor) -> Tensor:
        """(n, outputs) what a chooser compares: the scores."""
        return scores

    def gates(self, scores: Tensor) -> Tensor:
        """(n, outputs) what multiplies the output for a token that is taken: its score. The scorer learns through
        it."""
        return scores


class Router(Scorer):
    """Base of scorers that bring their own chooser, and may look at a token's past. Experts alone can take one.

    State that no gradient trains goes into integer buffers, which an engine's cast to bf16 leaves alone, and is renewed
    by an `update(statistics, step)` from what `observe` puts into `Trace.updates`.
    """

    chooser: Chooser

    def init_state(self, rows: int, like: Tensor) -> State | None:
        """What scoring must remember of a document while decoding: it is given to `forward(x, candidates, state)`, and
        updated in place. None where scoring sees one token alone."""
        return None

    def observe(self, x: Tensor, scores: Tensor, selection: ExpertSelection, candidates: Candidates) -> None:
        """Give the trace what the router's own training needs besides gradients: penalties, sums for `update`.

        Args:
            x: (n, D), as scored.
            selection: over all outputs, no-op experts included.
        """

    def update(self, statistics: Mapping[str, Tensor], step: int) -> None:
        """Renew what no gradient trains; called once per optimizer step.

        Args:
            statistics: what `observe` gave, summed over micro-batches and ranks; empty where it gave nothing.
        """
