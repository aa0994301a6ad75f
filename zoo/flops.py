"""Cost: FLOPs and active parameters a token, counted by every block for itself.

Conventions, for the whole repository: forward only, 2 FLOPs a multiply-add; causal scores at (T + 1) / 2 keys a query;
MoD at nominal capacity; per token of each modality; routers and auxiliary routers apart. Training is 3 × forward
without recomputation. Left out: norms, activations, rotary embedding, softmax, top-k, gathers, embedding look-ups.
"Active" are the weights a token meets on average under nominal routing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

TRAINING_FACTOR = 3


@dataclasses.dataclass(frozen=True)
class Cost:
    """Per token of each modality, in the order of the model's modalities."""

    flops: tuple[float, ...]
    active: tuple[float, ...]
    router: tuple[float, ...]
    auxiliary: tuple[float, ...]

    @classmethod
    def of(
        cls, modalities: int, flops: float = 0.0, active: float = 0.0, router: float = 0.0, auxiliary: float = 0.0
    ) -> Cost:
        """The same cost for tokens of every modality."""
        return cls(*(tuple([float(value)] * modalities) for value in (flops, active, router, auxiliary)))

    @classmethod
    def matmul(cls, modalities: int, weights: float) -> Cost:
        """Dense products with `weights` weights in all."""
        return cls.of(modalities, flops=2.0 * weights, active=weights)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(tuple(a + b for a, b in zip(x, y, strict=True)) for x, y in zip(self.parts(), other.parts(), strict=True))
        )

    def scaled(self, factor: float) -> Cost:
        """The cost when only the share `factor` of the tokens comes here."""
        return Cost(*(tuple(factor * value for value in part) for part in self.parts()))

    def parts(self) -> tuple[tuple[float, ...], ...]:
        return self.flops, self.active, self.router, self.auxiliary

    @staticmethod
    def total(costs: Iterable[Cost], modalities: int) -> Cost:
        result = Cost.of(modalities)
        for cost in costs:
            result = result + cost
        return result
