"""The runs of a sweep over pretrainings: their recipes, what they cost, and whether arms may be compared at all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pretrain import recipe as recipes
from pretrain.describe import blueprint
from pretrain.recipe import Recipe
from pretrain.recipe_file import merge
from tools.describe.tree import count
from tools.sweep.pretrain.settings import SweepConfig
from tools.sweep.report import table
from zoo.config import ConfigError
from zoo.roles import Role, parameter_roles

PAIRED = ("data", "modalities", "train.global_batch")
"""What arms must share so that they see the same documents in the same order."""
ROUTERS = (Role.ROUTER, Role.AUXILIARY)


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a model costs and holds; main and auxiliary routers stand apart. Per modality, in the model's order."""

    modalities: tuple[str, ...]
    flops: tuple[float, ...]
    """A token, forward."""
    routers: tuple[float, ...]
    """FLOPs a token of main and auxiliary routers."""
    active: tuple[float, ...]
    """Parameters a token meets."""
    total: int
    """Parameters of the whole model."""
    steps: int

    @classmethod
    def of(cls, recipe: Recipe) -> Facts:
        model = blueprint(recipe)
        cost = model.cost(recipe.data.sequence_length).expand(len(recipe.model.modalities))
        routers = tuple(a + b for a, b in zip(cost.router, cost.auxiliary, strict=True))
        # a product with a weight is 2 FLOPs
        active = tuple(a - r / 2 for a, r in zip(cost.active, routers, strict=True))
        role = parameter_roles(model)
        total = sum(p.numel() for name, p in model.named_parameters() if role[name] not in ROUTERS)
        return cls(tuple(recipe.model.modalities), cost.flops, routers, active, total, recipe.train.steps)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Facts:
        """From what JSON made of it."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class PretrainPoint:
    """One run: an arm at a size with a seed."""

    arm: str
    size: str
    seed: int
    facts: Facts
    problem: str = ""
    same_as: str = ""

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> PretrainPoint:
        """From what JSON made of it."""
        values: dict[str, Any] = {**data, "facts": Facts.read(data["facts"])}
        return cls(**values)

    @property
    def setting(self) -> str:
        return self.size

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.size}-{self.seed}"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a run."""

    kind: Literal["train", "upcycle", "routers"]
    """From the seed; from the weights that the stage before ended with; or of that stage's causal routers alone."""
    recipe: dict[str, Any]
    """A recipe's data without its seed and folder; of "routers" only what is laid over the recipe of the stage
    before."""


def stages(config: SweepConfig, arm: str, size: str, steps: int | None = None) -> list[Stage]:
    """What a run of `arm` at `size` trains, in order.

    Args:
        steps: of the whole run but the routers' stage; default: those of its recipe.
    """
    said = config.arms[arm]
    data = recipes.read(config.recipe)
    for over in (config.over, said.over, config.sizes[size], said.sizes.get(size, {})):
        data = merge(data, over)
    data = merge(data, {"name": f"{arm}-{size}"})
    data.pop("run_dir", None)
    train = data.get("train") or {}
    if steps is None:
        steps = train.get("steps")
    if said.begin is None or not isinstance(steps, int):
        found = [Stage("train", data if steps is None else _with_steps(data, steps))]
    else:
        first = max(1, round(steps * said.begin.share))
        small = _with_steps(merge(data, said.begin.over), first)
        found = [Stage("train", small), Stage("upcycle", _with_steps(data, max(1, steps - first)))]
    return found if said.routers is None else [*found, Stage("routers", said.routers)]


def _with_steps(data: dict[str, Any], steps: int) -> dict[str, Any]:
    return merge(data, {"train": {"steps": steps}})


def plan(config: SweepConfig) -> list[PretrainPoint]:
    """All points in the order in which they are run: size by size, seed by seed over all arms, so that what has been
    run can be compared at any time.

    Raises:
        ConfigError: a recipe is wrong, arms cannot be paired, or do not match the baseline.
    """
    found: dict[tuple[str, str], tuple[Recipe, Facts]] = {}
    for size in config.sizes:
        base = _resolved(config, config.base_arm, size, None)
        for arm in config.arms:
            recipe = _resolved(config, arm, size, steps_of(config, arm, size))
            found[arm, size] = recipe, dataclasses.replace(Facts.of(recipe), steps=_all_steps(config, arm, size))
            _check_pair(config, arm, size, recipe, base)
    facts = {key: each for key, (_, each) in found.items()}
    problems = [line for arm in config.arms for size in config.sizes for line in mismatches(config, facts, arm, size)]
    if problems:
        raise ConfigError("\n".join(["match: arms differ in what must be equal", *problems, "", show(config, facts)]))
    points, first = [], {}
    for (arm, size), each in facts.items():
        same = json.dumps([dataclasses.asdict(s) for s in _nameless(stages(config, arm, size, each.steps))])
        earlier = first.setdefault((same, size), arm)
        for seed in config.seeds:
            other = "" if earlier == arm else f"{earlier}-{size}-{seed}"
            points.append(PretrainPoint(arm, size, seed, each, same_as=other))
    sizes, arms = list(config.sizes), list(config.arms)
    return sorted(points, key=lambda p: (sizes.index(p.size), config.seeds.index(p.seed), arms.index(p.arm)))


def steps_of(config: SweepConfig, arm: str, size: str) -> int | None:
    """Steps of an arm's run where the sweep's rule sets them, else None."""
    if config.steps == "tokens":
        return None
    base, own = (Facts.of(_resolved(config, name, size, None)) for name in (config.base_arm, arm))
    return max(1, round(base.steps * sum(base.flops) / sum(own.flops)))


def _all_steps(config: SweepConfig, arm: str, size: str) -> int:
    trained = [stage for stage in stages(config, arm, size, steps_of(config, arm, size)) if stage.kind != "routers"]
    return sum(stage.recipe["train"]["steps"] for stage in trained)


def _resolved(config: SweepConfig, arm: str, size: str, steps: int | None) -> Recipe:
    """The recipe of the arm's own model."""
    found = [stage for stage in stages(config, arm, size, steps) if stage.kind != "routers"]
    try:
        resolved = [recipes.resolve(stage.recipe) for stage in found]
    except ConfigError as error:
        raise ConfigError(f"arms.{arm} at size {size}: {error}") from None
    recipe = resolved[-1]
    if not recipe.train.evaluate_every:
        raise ConfigError(
            f"arms.{arm} at size {size}: train.evaluate_every: 0; savings are read off curves of validation loss, so "
            "give the steps from one evaluation to the next"
        )
    return recipe


def _check_pair(config: SweepConfig, arm: str, size: str, recipe: Recipe, base: Recipe) -> None:
    """Raise ConfigError where the arm would see other documents, or in another order, than the baseline."""
    for key in PAIRED:
        if key in config.vary:
            continue
        ours, theirs = (_at(each.dump(), key) for each in (recipe, base))
        lines = recipes.differences({key: theirs}, {key: ours}) if ours != theirs else []
        if lines:
            raise ConfigError(
                f"arms.{arm} at size {size}: differs from {config.base_arm} in what data it sees, so their runs are "
                f"no pairs ({'; '.join(lines)}); make it equal"
                + ("" if "." in key else f", or, if that is what is compared, write vary: [{key}]")
            )


def _at(data: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data


def _nameless(found: Sequence[Stage]) -> list[Stage]:
    return [dataclasses.replace(s, recipe={k: v for k, v in s.recipe.items() if k != "name"}) for s in found]


AllFacts = Mapping[tuple[str, str], Facts]
"""By arm and size."""


def mismatches(config: SweepConfig, facts: AllFacts, arm: str, size: str) -> list[str]:
    """A line for each thing that must match and does not."""
    free = config.arms[arm].unmatched
    ours, base = facts[arm, size], facts[config.like, size]
    if config.steps == "flops":
        scale = ours.steps / base.steps
        ours = dataclasses.replace(ours, flops=tuple(scale * each for each in ours.flops))
    lines = []
    for key, tolerance in _held(config).items():
        if key in free:
            continue
        mine, theirs = _by_modality(ours, key), _by_modality(base, key)
        off = {name: mine[name] / theirs[name] - 1 for name in mine if name in theirs}
        worst = max(off, key=lambda name: abs(off[name]))
        if abs(off[worst]) > tolerance:
            where = f" ({worst})" if len(off) > 1 else ""
            lines.append(
                f"arms.{arm} at size {size}: {key}{where} {off[worst]:+.1%} of {config.like}'s, and match.{key} "
                f"allows {tolerance:.1%}; change its sizes, or say in arms.{arm}.unmatched.{key} why it need not match"
            )
    return lines


def _held(config: SweepConfig) -> dict[str, float]:
    """What must match, with its tolerance."""
    return {key: value for key, value in config.match.model_dump(exclude={"like"}).items() if value is not None}


def _by_modality(facts: Facts, key: str) -> dict[str, float]:
    value = getattr(facts, key)
    return dict(zip(facts.modalities, value, strict=True)) if isinstance(value, tuple) else {"all": value}


HEADS = ("arm", "size", "FLOPs a token", "Δ", "routers", "active", "Δ", "total", "Δ")


def show(config: SweepConfig, facts: AllFacts) -> str:
    """The table of what arms cost and hold, as Markdown; and why some need not match."""
    lines = [
        _line(arm, size, each, facts[config.like, size])
        for arm in config.arms
        for size in config.sizes
        for each in (facts[arm, size],)
    ]
    held = ", ".join(f"{key} ± {value:.1%}" for key, value in _held(config).items())
    names = "/".join(next(iter(facts.values())).modalities)
    text = (
        f"FLOPs and active parameters are those of a token ({names}, one number where they are equal), forward, "
        f"routers apart. Must match {config.like}: {held}"
        + (", FLOPs of the whole training." if config.steps == "flops" else ".")
    )
    free = [f"- {name}, {key}: {why}" for name, arm in config.arms.items() for key, why in arm.unmatched.items()]
    return "\n\n".join(
        [table((*HEADS, "steps"), lines), text, *(["Need not match:\n\n" + "\n".join(free)] if free else [])]
    )


def _line(arm: str, size: str, ours: Facts, base: Facts) -> list[str]:
    cells = [arm, size]
    for key in ("flops", "active", "total"):
        mine, theirs = _by_modality(ours, key), _by_modality(base, key)
        cells += [_numbers(mine.values()), _percents(mine[name] / theirs[name] - 1 for name in mine if name in theirs)]
        if key == "flops":
            cells.append(_numbers(ours.routers))
    return [*cells, f"{ours.steps}"]


def _numbers(values: Any) -> str:
    return " / ".join(dict.fromkeys(map(count, values)))


def _percents(values: Any) -> str:
    return " / ".join(dict.fromkeys(f"{value:+.1%}" for value in values))


def overrides(over: Mapping[str, Any], path: str = "") -> list[str]:
    """`key.sub=value` of each value in nested keys."""
    found = []
    for key, value in over.items():
        name = f"{path}.{key}" if path else key
        found += overrides(value, name) if isinstance(value, Mapping) else [f"{name}={json.dumps(value)}"]
    return found
