"""Cost: FLOPs and active parameters a token, counted by every block for itself.

Conventions, for the whole repository: forward only, 2 FLOPs a multiply-add; causal scores at (T + 1) / 2 keys a query;
MoD at nominal capacity; per token of each modality; routers and auxiliary routers apart. Training is 3 × forward
without recomputation. Left out: norms, activations, rotary embedding, softmax, top-k, gathers, embedding look-ups.
"Active" are the weights a token meets on average under nominal routing.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable

TRAINING_FACTOR = 3

Each = tuple[float, ...]
"""One number a modality, in the order of the model's modalities; or a single one, which holds for every modality."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a token costs. A block whose cost does not depend on the modality need not know how many there are."""

    flops: Each
    active: Each
    router: Each
    auxiliary: Each

    @classmethod
    def of(cls, flops: float = 0.0, active: float = 0.0, router: float = 0.0, auxiliary: float = 0.0) -> Cost:
        """The same cost for tokens of every modality."""
        return cls((float(flops),), (float(active),), (float(router),), (float(auxiliary),))

    @classmethod
    def matmul(cls, weights: float) -> Cost:
        """Dense products of a token with `weights` weights in all, whatever its modality."""
        return cls.of(flops=2.0 * weights, active=weights)

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(_pairwise(operator.add, a, b) for a, b in zip(self.parts(), other.parts(), strict=True)))

    def scaled(self, *factors: float) -> Cost:
        """The cost when only a share of the tokens comes here: one factor, or one a modality."""
        return Cost(*(_pairwise(operator.mul, factors, part) for part in self.parts()))

    def expand(self, modalities: int) -> Cost:
        """The same cost with a number written out for each of so many modalities."""
        return self.scaled(*[1.0] * modalities)

    def parts(self) -> tuple[Each, Each, Each, Each]:
        return self.flops, self.active, self.router, self.auxiliary

    @staticmethod
    def total(costs: Iterable[Cost]) -> Cost:
        return sum(costs, Cost.of())


def _pairwise(operation: Callable[[float, float], float], a: Each, b: Each) -> Each:
    """`operation` on the numbers of each modality; a single number meets all of the other's."""
    if len(a) == 1 or len(b) == 1:
        longest = max(len(a), len(b))
        a, b = a * (longest // len(a)), b * (longest // len(b))
    return tuple(operation(x, y) for x, y in zip(a, b, strict=True))
