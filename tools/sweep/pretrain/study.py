"""Runs to be compared, whether they come from a sweep or are named one by one."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from pretrain import recipe as recipes
from pretrain import run_folder
from pretrain.describe import objective_of
from pretrain.document_losses import DocumentLosses
from pretrain.recipe import Recipe
from tools.sweep.folder import RUNS
from tools.sweep.launch import LOG, TAIL
from tools.sweep.pretrain import plan
from tools.sweep.pretrain.curves import Evaluation, Speed, causal_ones, curves, evaluations, speed
from tools.sweep.pretrain.documents import redrawn
from tools.sweep.pretrain.plan import Facts, PretrainPoint
from tools.sweep.pretrain.run import STAGES
from tools.sweep.pretrain.savings import Curve, Pair, Redrawn
from tools.sweep.pretrain.settings import ArmConfig, MatchConfig, SweepConfig
from tools.sweep.rows import ArmResults, gather
from zoo.config import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """One finished run: an arm at a size with a seed."""

    arm: str
    size: str
    seed: int
    trained: tuple[Path, ...]
    """Run folders of its trainings, in order."""

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.size}-{self.seed}"

    @functools.cached_property
    def evaluations(self) -> list[Evaluation]:
        return evaluations(self.trained)

    @functools.cached_property
    def speed(self) -> Speed | None:
        return speed(self.trained)

    @functools.cached_property
    def recipe(self) -> Recipe:
        """The recipe of its last training."""
        return recipes.load(self.trained[-1] / run_folder.RECIPE)

    @property
    def commit(self) -> str:
        """The library's commit that made it; "" where it is not known."""
        path = self.trained[-1] / run_folder.ENVIRONMENT
        return (json.loads(path.read_text()).get("commit") or "") if path.exists() else ""

    def curves(self, axis: str) -> dict[str, Curve]:
        """As `curves.curves`."""
        return curves(self.evaluations, axis)

    @functools.cached_property
    def documents(self) -> list[DocumentLosses]:
        """The losses of single documents at each point of the curves; empty where one of the points lacks them."""
        paths = [each.documents for each in causal_ones(self.evaluations, "steps")]
        return [DocumentLosses.load(path) for path in paths] if all(path.exists() for path in paths) else []

    @functools.cached_property
    def redrawn(self) -> dict[str, np.ndarray]:
        """As `documents.redrawn`; empty as `documents` is."""
        return redrawn(objective_of(self.recipe), self.documents) if self.documents else {}


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run without a result."""

    name: str
    text: str
    """Why, or the end of what it printed; "" where it has not begun."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What a report is of."""

    title: str
    baseline: str
    arms: tuple[str, ...]
    sizes: tuple[str, ...]
    runs: tuple[Run, ...]
    failures: tuple[Failure, ...]
    costs: tuple[str, ...]
    """Paragraphs of Markdown, the first of them the table of costs."""
    notes: tuple[str, ...]
    """What is to be known of how it was done, a sentence or two each."""
    compare: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Arms that are also compared with another than the baseline, by the arm."""

    def of(self, arm: str, size: str) -> list[Run]:
        """Finished runs, by seed."""
        return sorted((run for run in self.runs if (run.arm, run.size) == (arm, size)), key=lambda run: run.seed)

    def pairs(self, arm: str, size: str, axis: str, name: str, baseline: str | None = None) -> list[Pair]:
        """Curves of the arm and of the baseline for each seed that both have, of a modality or "all".

        Args:
            baseline: another arm, in the place of the baseline.
        Raises:
            UserError: they did not see the same data.
        """
        theirs = {run.seed: run for run in self.of(baseline or self.baseline, size)}
        found = []
        for run in self.of(arm, size):
            other = theirs.get(run.seed)
            if other is None:
                continue
            check_paired(run, other)
            ours, base = run.curves(axis).get(name), other.curves(axis).get(name)
            if ours is not None and base is not None:
                found.append(Pair(ours, base, _redrawn(run, other, name)))
        return found

    def losses(self) -> list[str]:
        """ "all", then the modalities that any run has a causal loss of, those of the baseline first."""
        ordered = sorted(self.runs, key=lambda run: run.arm != self.baseline)
        return list(dict.fromkeys(name for run in ordered for name in ("all", *run.curves("tokens"))))

    def cells(self) -> Iterator[tuple[str, str, list[Run]]]:
        """Each arm and size that has finished runs."""
        for size in self.sizes:
            for arm in self.arms:
                if runs := self.of(arm, size):
                    yield arm, size, runs


def _redrawn(run: Run, other: Run, name: str) -> Redrawn | None:
    """The two runs' losses of that name on other choices of documents; None where these were not kept, or differ."""
    if not run.documents or not other.documents:
        return None
    ours, theirs = run.documents[0].documents, other.documents[0].documents
    if not np.array_equal(ours, theirs) or name not in run.redrawn or name not in other.redrawn:
        return None
    return Redrawn(run.redrawn[name], other.redrawn[name])


def check_paired(run: Run, other: Run) -> None:
    """Raise UserError where two runs of one seed have not seen as many tokens after as many steps."""
    if run.recipe.data != other.recipe.data or run.recipe.modalities != other.recipe.modalities:
        return  # a sweep says in `vary` that it compares these
    ours, theirs = ({each.used["steps"]: each.used["tokens"] for each in r.evaluations} for r in (run, other))
    for step in sorted(ours.keys() & theirs.keys()):
        if ours[step] != theirs[step]:
            raise UserError(
                f"{run.name} and {other.name} are no pair: after step {step:g} one has seen {ours[step]:,.0f} tokens "
                f"and the other {theirs[step]:,.0f}; their data are not the same, run one of them anew"
            )


def of_sweep(config: SweepConfig, points: Sequence[PretrainPoint], out: Path) -> Study:
    """What a sweep has run so far in `out`.

    Raises:
        UserError: runs that are to be compared were trained or evaluated on different data.
    """
    runs, failures, rows = [], [], gather(points, out)
    if not config.vary:
        check_data(rows)
    for row in rows:
        for point, _ in row.results:
            folder = out / RUNS / (point.same_as or point.name)
            trained = tuple(folder / name for name in STAGES.values() if (folder / name).is_dir())
            runs.append(Run(point.arm, point.size, point.seed, trained))
        failures += [Failure(point.name, point.problem) for point in row.points if point.problem]
        failures += [Failure(name, _tail(out / RUNS / name / LOG)) for name in row.missing()]
    facts = {(point.arm, point.size): point.facts for point in points}
    notes = [f"{point.arm} is the same as {point.same_as.partition('-')[0]}." for point in points if point.same_as]
    commits = sorted({run.commit for run in runs if run.commit})
    if len(commits) > 1:
        notes.append(f"Runs were made by the commits {', '.join(each[:7] for each in commits)}.")
    if config.jobs > 1:
        notes.append(f"{config.jobs} runs went on side by side, so that seconds are those of a shared machine.")
    return Study(
        out.name,
        config.base_arm,
        tuple(config.arms),
        tuple(config.sizes),
        tuple(runs),
        tuple(failures),
        tuple(plan.show(config, facts).split("\n\n")),
        tuple(dict.fromkeys(notes)),
        config.compare,
    )


def check_data(rows: Sequence[ArmResults[PretrainPoint]]) -> None:
    """Raise UserError where the runs of a size have not the same data, by content: they may come from several
    machines."""
    for what, done in (("data", "trained"), ("validation", "evaluated")):
        found: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            for point, result in row.results:
                found.setdefault(row.setting, {}).setdefault(result[what][:8], []).append(point.name)
        for size, groups in found.items():
            if len(groups) > 1:
                named = "; ".join(f"{content} {', '.join(names)}" for content, names in groups.items())
                raise UserError(
                    f"size {size}: runs were {done} on different data: {named}; shards or tokenizers differ, so give "
                    "modalities.NAME.path the files of one of them, and do the others anew"
                )


def of_runs(folders: Sequence[Path], baseline: str | None) -> Study:
    """Finished runs, those whose recipes differ in the seed alone being one arm.

    Args:
        baseline: the name of an arm, which is its recipe's; default: that of the first run.
    Raises:
        UserError: a folder is no run, two runs are one arm's with one seed, or the baseline is not there.
    """
    arms: dict[str, str] = {}
    runs = []
    for folder in folders:
        if not (folder / run_folder.RECIPE).exists():
            raise UserError(f"{folder}: holds no {run_folder.RECIPE}; give folders of runs")
        recipe = recipes.load(folder / run_folder.RECIPE)
        told = {key: value for key, value in recipe.dump().items() if key not in ("name", "seed", "run_dir")}
        key = json.dumps([recipe.name, told], sort_keys=True)
        name = arms.setdefault(key, recipe.name if recipe.name not in arms.values() else folder.name)
        runs.append(Run(name, "one", recipe.seed, (folder,)))
        if (name, recipe.seed) in {(run.arm, run.seed) for run in runs[:-1]}:
            raise UserError(f"{folder}: a run of {name} with seed {recipe.seed} is named already; remove one")
    base = runs[0].arm if baseline is None else baseline
    if base not in arms.values():
        raise UserError(f"--baseline: {base!r} is none of {', '.join(arms.values())}; give one of them")
    facts = {(run.arm, "one"): Facts.of(run.recipe) for run in runs}
    free = {arm: ArmConfig() for arm in arms.values()}
    config = SweepConfig(recipe="", arms=free, baseline=base, match=MatchConfig(flops=0.99))
    costs = plan.show(config, facts).split("\n\n")[:1]
    return Study(", ".join(arms.values()), base, tuple(arms.values()), ("one",), tuple(runs), (), tuple(costs), ())


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]) if log.exists() else ""
