"""Adapt one dense multimodal LLM in many ways of equal decoder FLOPs, tune all alike, and compare how well they answer.

    python -m tools.adapt_sweep SWEEP.yaml OUT [key.sub=value ...]

The same command goes on where it stopped. OUT gets `arank.json`, `runs/<arm>-<target>-<seed>/result.json`,
`timing.json`, `results.md`, `accuracy.png` or, where that is the metric, `perplexity.png`, and `skip.png`. A run is
`python -m pretrain.finetune`, resumed by itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain import recipe as recipes
from pretrain.finetune import recipe as finetune_recipe
from tools.adapt_sweep import settings
from tools.adapt_sweep.launch import launch
from tools.adapt_sweep.metrics import METRICS
from tools.adapt_sweep.plan import Planner, Point
from tools.adapt_sweep.point import BEFORE, POINT, RESULT, RUN
from tools.adapt_sweep.settings import SweepConfig
from zoo.config import ConfigError, UserError

PLAN, SWEEP, ARANK, RUNS = "plan.json", "sweep.json", "arank.json", "runs"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.adapt_sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--report", action="store_true", help="only write the report of what has been run")
    parser.add_argument("--no-timing", action="store_true", help="leave prefill and decode times out")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return sweep(settings.load(options.sweep, options.overrides), options.out, options.report, options.no_timing)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def sweep(config: SweepConfig, out: Path, only_report: bool = False, no_timing: bool = False) -> int:
    """Everything that is not done yet; returns the exit code, 1 where a run failed.

    Raises:
        UserError: a mistake of the user's; it is found before any run is launched.
    """
    from tools.adapt_sweep import report

    recipe = base_recipe(config)
    check_folder(config, out)
    points = planned(config, recipe, out)
    prepared = [prepare(config, recipe, point, out) for point in points if not point.problem and not point.same_as]
    for point in points:
        if point.problem:
            print(f"{point.name}: not run, {point.problem}")
    failed = []
    if not only_report:
        waiting = [folder for folder in prepared if not (folder / RESULT).exists()]
        failed = launch(waiting, config.jobs, METRICS[config.test.metric])
        if not no_timing and not failed:
            from tools.adapt_sweep import timing

            timing.measure(config, recipe, points, out / "timing.json")
    written = report.write(config, points, out)
    print(f"{', '.join(path.name for path in written)} are in {out}")
    return 1 if failed else 0


def base_recipe(config: SweepConfig) -> dict[str, Any]:
    """The fine-tuning that all runs share, as a recipe's data.

    Raises:
        ConfigError: it is none.
    """
    sections = ("optimizer", "schedule", "train", "evaluate")
    data = recipes.read(config.recipe, over={section: getattr(config, section) for section in sections})
    data.pop("adapt", None)
    data |= {"base": config.base, "data": {**(data.get("data") or {}), "path": config.data}}
    recipe = finetune_recipe.AdaptRecipe.parse(data)
    recipes.check_batches(recipe.train)
    return recipe.dump()


def check_folder(config: SweepConfig, out: Path) -> None:
    """`out` is new, or of a sweep that shares what finished runs depend on.

    Raises:
        UserError: it belongs to another.
    """
    ours = config.model_dump(mode="json", exclude=settings.FREE) | {"weights": digest(Path(config.base))}
    if (out / SWEEP).exists():
        theirs = json.loads((out / SWEEP).read_text())
        changed = [
            f"{key}: {theirs.get(key)!r} there, {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]
        ]
        if changed:
            raise UserError(
                f"{out} belongs to another sweep; give another folder. Different are\n  " + "\n  ".join(changed)
            )
    out.mkdir(parents=True, exist_ok=True)
    _write(out / SWEEP, ours)


def digest(base: Path) -> str:
    """sha256 of a model's weights as its folder holds them."""
    found = hashlib.sha256()
    for path in sorted((*base.glob("*.safetensors"), *base.glob("*.bin"))):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def planned(config: SweepConfig, recipe: dict[str, Any], out: Path) -> list[Point]:
    """The points of the sweep; kept in `out`, with ARank, until the sweep changes."""
    key = {"sweep": config.model_dump(mode="json", exclude={"jobs", "keep_models", "timing"}), "recipe": recipe}
    path = out / PLAN
    if path.exists() and (kept := json.loads(path.read_text()))["of"] == key:
        return [Point.read(point) for point in kept["points"]]
    from pretrain.finetune import model as models
    from pretrain.finetune.questions import read_questions
    from tools.adapt_sweep.prompts import Prompts
    from zoo.adapt import AdaptConfig

    models.quiet(0)
    base = models.open_base(finetune_recipe.AdaptRecipe.parse(recipe))
    if base.adapted:
        raise ConfigError(f"base: {config.base!r} is adapted already; give the dense model it was made of")
    questions = read_questions(Path(config.data), config.test.split)[: config.test.samples]
    asked = {"train": read_questions(Path(config.data), "train"), "test": questions}
    asked["threshold"] = read_questions(Path(config.data), config.threshold.split)
    for section, found in asked.items():
        if not any(question.images for question in found):
            raise ConfigError(
                f"{section}: no question of {config.data!r} taken for it has an image; give data that have"
            )
    prompts = Prompts.encode(questions, base.processor, config.test.batch)
    shapes: dict[tuple[str, str], Any] = {}

    def shapes_of(adapt: AdaptConfig) -> Any:
        kind = (adapt.group, adapt.candidates)
        if kind not in shapes:
            shapes[kind] = prompts.shapes(adapt, base.config)
        return shapes[kind]

    ranks = [layer["rank_over_length"] for layer in ranked(config, out / ARANK)["layers"]]
    points = Planner(config, base.blueprint, shapes_of, ranks).points()
    _write(path, {"of": key, "points": [dataclasses.asdict(point) for point in points]})
    return points


def ranked(config: SweepConfig, path: Path) -> dict[str, Any]:
    """ARank of the base, from `path`, or measured and written there with its picture."""
    from tools import arank

    if path.exists():
        return arank.read(path)
    asked = {**arank.MEASURING, **config.arank.model_dump()}
    result = arank.measured(config.base, Path(config.data), asked)
    arank.propose(result, None, None, None, 0.5, config.last_layer)
    arank.draw(result, path.with_suffix(".png"))
    _write(path, result)
    return result


def prepare(config: SweepConfig, recipe: dict[str, Any], point: Point, out: Path) -> Path:
    """The run's folder, with what it is to do.

    Raises:
        UserError: it has another run of this name.
    """
    folder = out / RUNS / point.name
    made = {"name": point.name, "seed": point.seed, "run_dir": str(folder / RUN), "adapt": point.adapt}
    tuned = finetune_recipe.AdaptRecipe.parse({**recipe, **made}).dump()
    wanted = {
        "point": dataclasses.asdict(point),
        "recipe": tuned,
        "test": config.test.model_dump(),
        "threshold": config.threshold.model_dump(),
        "tolerance": config.tolerance,
        "keep_models": config.keep_models,
    }
    wanted = json.loads(json.dumps(wanted))
    path = folder / POINT
    if path.exists():
        there = json.loads(path.read_text())
        changed = [key for key in wanted if key != "keep_models" and wanted[key] != there.get(key)]
        if changed and (folder / RESULT).exists():
            raise UserError(
                f"{folder} holds a run of that name with another {' and '.join(changed)}; name the arm anew, or remove the "
                "folder"
            )
        if changed:
            (folder / BEFORE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, wanted)
    return folder


def _write(path: Path, data: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
