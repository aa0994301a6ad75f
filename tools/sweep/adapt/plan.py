"""Which layers each arm routes, and with what capacity, so that its decoder FLOPs meet the target."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

import zoo.adapt as za
from pretrain import recipe as recipes
from pretrain.finetune.prompt_batches import Shapes
from tools.sweep.adapt.settings import ArmConfig, SweepConfig
from tools.sweep.rows import ArmResults
from zoo.adapt.config import Progressive
from zoo.adapt.family import parts
from zoo.config import ConfigError, UserError

DIGITS = 4
"""Decimals of a share that is solved for."""


@dataclasses.dataclass(frozen=True)
class AdaptPoint:
    """One run: an arm at a target with a seed."""

    arm: str
    target: float
    seed: int
    adapt: dict[str, Any] | None
    """What `zoo.adapt.adapt` gets; None for the dense control, and where no run is possible."""
    train: bool
    capacities: dict[int, float]
    """Capacity of each routed layer, by its number."""
    flops: float
    """Nominal, over the dense model's."""
    void: bool = False
    """The rule had no choice: every layer that may be routed is."""
    problem: str = ""
    """Why there is no run."""
    same_as: str = ""
    """The run of another arm that is the same in all that matters."""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> AdaptPoint:
        """From what JSON made of it."""
        capacities = {int(layer): capacity for layer, capacity in data["capacities"].items()}
        values: dict[str, Any] = {**data, "capacities": capacities}
        return cls(**values)

    @property
    def setting(self) -> str:
        """The target, as names and tables have it."""
        return f"{self.target:g}"

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.setting}-{self.seed}"

    @property
    def learned(self) -> bool:
        return self.adapt is not None and self.adapt.get("router", {}).get("type", "linear") == "linear"


def target_of(row: ArmResults[AdaptPoint]) -> float:
    """The target of all points of a row."""
    return row.points[0].target


def layer_sets(rule: str, candidates: Sequence[int], ranks: Sequence[float], seed: int) -> list[list[int]]:
    """The sets of layers that a rule offers, in the order in which they are tried: fewer layers first.

    Args:
        rule: of `ArmConfig.layers`, but "recipe".
        candidates: layers that may be routed, ascending.
        ranks: rank_over_length of every layer; of equal ones the deeper layer counts as lower.
        seed: of the random draw.
    """
    count = len(candidates)
    if rule == "all":
        return [list(candidates)]
    if rule == "every_second":
        return [list(candidates[::2]), list(candidates)]
    if rule == "alternate":
        spread = [[round(i * (count - 1) / (n - 1)) for i in range(n)] for n in range(2, count + 1)]
        return [[candidates[i] for i in places] for places in ([count // 2], *spread)]
    if rule == "random":
        order = random.Random(seed).sample(list(candidates), count)
    else:
        order = sorted(candidates, key=lambda layer: (ranks[layer], -layer), reverse=rule == "arank_high")
    return [sorted(order[:n]) for n in range(1, count + 1)]


def solve(ratio: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The x in [low, high], of DIGITS decimals, with ratio(x) nearest to the target; ratio is monotone and has
    steps."""
    a, b = round(low * 10**DIGITS), round(high * 10**DIGITS)
    while b - a > 1:
        middle = (a + b) // 2
        a, b = (middle, b) if ratio(middle / 10**DIGITS) <= target else (a, middle)
    return min((a / 10**DIGITS, b / 10**DIGITS), key=lambda x: abs(ratio(x) - target))


class Planner:
    """Plans the points of a sweep.

    Args:
        model: the dense model; may be on the meta device. It is adapted and restored.
        shapes: test prompts by the groups of an AdaptConfig.
        ranks: rank_over_length of every layer.
    """

    def __init__(
        self, sweep: SweepConfig, model: nn.Module, shapes: Callable[[za.AdaptConfig], Shapes], ranks: Sequence[float]
    ) -> None:
        self.sweep, self.model, self.shapes, self.ranks = sweep, model, shapes, ranks
        self.depth = len(parts(model).layers)
        self.known: dict[str, tuple[float, dict[int, float]]] = {}

    def points(self) -> list[AdaptPoint]:
        """All of them; of several that are one and the same run all but the first say so.

        Raises:
            ConfigError: an arm that cannot be, whatever its target.
        """
        seen: dict[str, str] = {}
        points = []
        for arm, config in self.sweep.arms.items():
            for target in (1.0,) if config.dense else self.sweep.targets:
                for seed in self.sweep.seeds:
                    point = self.point(arm, config, target, seed)
                    by_seed = config.train or config.tokens == "random"
                    key = json.dumps((point.adapt, config.train, seed if by_seed else 0), sort_keys=True)
                    if not point.problem:
                        first = seen.setdefault(key, point.name)
                        point = dataclasses.replace(point, same_as="" if first == point.name else first)
                    points.append(point)
        return points

    def point(self, arm: str, config: ArmConfig, target: float, seed: int) -> AdaptPoint:
        if config.dense:
            return AdaptPoint(arm, target, seed, None, True, {}, 1.0)
        try:
            return self._point(arm, config, target, seed)
        except UserError as error:
            raise ConfigError(f"arms.{arm}: {error}") from None

    def _point(self, arm: str, config: ArmConfig, target: float, seed: int) -> AdaptPoint:
        sets = list(self._adaptations(config, seed))
        value = {"value": (0.0, 1.0), "centre": (-0.5, 1.5)}[config.solve]
        best: tuple[float, dict[str, Any]] | None = None
        for number, adapt in enumerate(sets):
            low, high = value
            if number < len(sets) - 1:  # another set follows, with more layers
                low = self.sweep.min_capacity
                if self.ratio(self._with(adapt, config.solve, low)) > target:
                    continue

            def ratio(share: float, adapt: dict[str, Any] = adapt) -> float:
                return self.ratio(self._with(adapt, config.solve, share))

            # a capacity of 0 keeps nothing and is refused
            least = low if low or config.solve != "value" else 10**-DIGITS
            chosen = self._with(adapt, config.solve, solve(ratio, target, least, high))
            best = (self.ratio(chosen), chosen)
            if abs(best[0] / target - 1) <= self.sweep.tolerance:
                break
        assert best is not None, "the last set is always tried"
        reached, adapt = best
        capacities = self._measured(adapt)[1]
        void = config.layers not in ("recipe", "all") and len(capacities) == len(self.candidates(config))
        if abs(reached / target - 1) > self.sweep.tolerance:
            problem = (
                f"{len(capacities)} layers give {reached:.3f} of dense FLOPs, not {target:g} within "
                f"{self.sweep.tolerance:.0%}"
            )
            return AdaptPoint(arm, target, seed, None, config.train, capacities, reached, void, problem)
        return AdaptPoint(arm, target, seed, adapt, config.train, capacities, reached, void)

    def candidates(self, config: ArmConfig) -> list[int]:
        """Layers that the arm may route; those of a control in which a draw replaces the routers are the recipe's."""
        supervised = self._read(config).get("auxiliary", {}).get("type", "none") != "none"
        unlearned = config.recipe is None and config.tokens != "learned"
        last = self.sweep.last_layer and (supervised or unlearned)
        return list(range(1, self.depth if last else self.depth - 1))

    def _read(self, config: ArmConfig) -> dict[str, Any]:
        """The arm's `adapt` section as it is written."""
        read = {} if config.recipe is None else recipes.read(config.recipe, over={"adapt": config.adapt})
        return dict(read.get("adapt") or config.adapt)

    def _adaptations(self, config: ArmConfig, seed: int) -> Iterator[dict[str, Any]]:
        """The arm's `adapt` sections, its capacity not yet set, in the order in which they are tried."""
        adapt = self._read(config)
        adapt["inference"] = {"rule": "topk", "text": "keep"}
        if config.tokens != "learned":
            adapt |= {"router": {"type": config.tokens}, "gate": {"activation": "none"}, "auxiliary": {"type": "none"}}
            if config.tokens == "random":
                adapt["router"] = {"type": "random", "seed": seed}
        if config.layers == "recipe":
            if "layers" not in adapt:
                raise ConfigError(
                    "adapt.layers: layers is recipe, and the recipe names none; add them, or choose a rule"
                )
            yield adapt
            return
        candidates = self.candidates(config)
        if not candidates:
            raise ConfigError(f"layers: none of the decoder's {self.depth} may be routed; set last_layer: true")
        for layers in layer_sets(config.layers, candidates, self.ranks, seed):
            yield adapt | {"layers": layers, "last_layer": self.depth - 1 in layers}

    def _with(self, adapt: Mapping[str, Any], key: str, value: float) -> dict[str, Any]:
        capacity = {"type": "constant"} if key == "value" else adapt.get("capacity", {"type": "progressive"})
        return {**adapt, "capacity": {**capacity, key: value}}

    def ratio(self, adapt: Mapping[str, Any]) -> float:
        """Decoder FLOPs of the test prompts over those of the dense model, routers included."""
        return self._measured(adapt)[0]

    def _measured(self, adapt: Mapping[str, Any]) -> tuple[float, dict[int, float]]:
        key = json.dumps(adapt, sort_keys=True)
        if key not in self.known:
            config = za.AdaptConfig.parse(adapt, "adapt")
            if isinstance(config.capacity, Progressive) and not _routes(config.capacity, self.depth):
                return 1.0, {}
            shapes = self.shapes(config)
            dense = sum(count * za.decoder_flops(self.model, tokens).total for (tokens, _), count in shapes.items())
            za.adapt(self.model, config)
            try:
                flops = sum(
                    count * za.decoder_flops(self.model, tokens, groups).total
                    for (tokens, groups), count in shapes.items()
                )
            finally:
                za.restore(self.model)
            self.known[key] = flops / dense, {layer: float(share) for layer, share in config.plan(self.depth).items()}
        return self.known[key]


def _routes(capacity: Progressive, depth: int) -> bool:
    """Whether a progressive capacity leaves any layer to be routed."""
    return any(capacity.of(layer, depth) < 1 for layer in range(1, depth))
