"""A sweep over adaptations: one dense multimodal LLM made cheaper in many ways, all tuned alike; see `kind.Sweep`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pretrain import recipe as recipes
from pretrain.finetune.questions import Question, read_questions
from pretrain.finetune.recipe import FinetuneRecipe
from tools.sweep.adapt import settings
from tools.sweep.adapt.metrics import METRICS
from tools.sweep.adapt.plan import AdaptPoint, Planner
from tools.sweep.adapt.run import BEFORE, work
from tools.sweep.adapt.settings import SweepConfig
from tools.sweep.folder import RUN, write_json
from tools.sweep.kind import Result
from zoo.config import ConfigError

ARANK, TIMING = "arank.json", "timing.json"


@dataclasses.dataclass(frozen=True)
class AdaptSweep:
    """Args: recipe: the fine-tuning that all runs share, as a recipe's data."""

    config: SweepConfig
    recipe: dict[str, Any]
    type: ClassVar[str] = "adapt"
    free_settings: ClassVar[frozenset[str]] = frozenset({"keep_models"})

    @property
    def jobs(self) -> int:
        return self.config.jobs

    @property
    def accelerators(self) -> int:
        return 1

    @classmethod
    def load(cls, data: Mapping[str, Any], folder: Path) -> AdaptSweep:
        config = settings.parse(data, folder)
        return cls(config, base_recipe(config))

    def shared(self) -> dict[str, Any]:
        said = self.config.model_dump(mode="json", exclude=settings.FREE)
        return said | {"weights": digest(Path(self.config.base))}

    def plan_key(self) -> dict[str, Any]:
        said = self.config.model_dump(mode="json", exclude={"jobs", "keep_models", "timing"})
        return {"sweep": said, "recipe": self.recipe}

    def plan(self, out: Path) -> list[AdaptPoint]:
        from pretrain.finetune import model as models
        from pretrain.finetune.prompt_batches import Prompts
        from zoo.adapt import AdaptConfig

        config = self.config
        models.quiet(0)
        base = models.open_base(FinetuneRecipe.parse(self.recipe))
        if base.adapted:
            raise ConfigError(f"base: {config.base!r} is adapted already; give the dense model it was made of")
        prompts = Prompts.encode(self._questions(), base.processor, config.test.batch)
        shapes: dict[tuple[str, str], Any] = {}

        def shapes_of(adapt: AdaptConfig) -> Any:
            kind = (adapt.group, adapt.candidates)
            if kind not in shapes:
                shapes[kind] = prompts.shapes(adapt, base.config)
            return shapes[kind]

        ranks = [layer["rank_over_length"] for layer in self._ranked(out / ARANK)["layers"]]
        return Planner(config, base.blueprint, shapes_of, ranks).points()

    def preview(self, points: Sequence[AdaptPoint]) -> str:
        return ""

    @staticmethod
    def read_point(data: Mapping[str, Any]) -> AdaptPoint:
        return AdaptPoint.read(data)

    def settings(self, point: AdaptPoint, folder: Path) -> dict[str, Any]:
        made = {"name": point.name, "seed": point.seed, "run_dir": str(folder / RUN), "adapt": point.adapt}
        return {
            "point": dataclasses.asdict(point),
            "recipe": FinetuneRecipe.parse({**self.recipe, **made}).dump(),
            "test": self.config.test.model_dump(),
            "threshold": self.config.threshold.model_dump(),
            "tolerance": self.config.tolerance,
            "keep_models": self.config.keep_models,
        }

    def discard(self, folder: Path) -> None:
        (folder / BEFORE).unlink(missing_ok=True)

    @classmethod
    def run(cls, folder: Path, settings: dict[str, Any]) -> Result:
        return work(folder, settings)

    def kept(self, folder: Path) -> list[Path]:
        return []

    def summary(self, result: Result) -> str:
        metric = METRICS[self.config.test.metric]
        before, after = (metric.show([metric.of(result[when])]) for when in ("before", "after"))
        return f"{metric.name} {before} → {after} at {result['after']['flops']:.3f} of dense FLOPs"

    def measure(self, points: Sequence[AdaptPoint], out: Path) -> None:
        from tools.sweep.adapt import timing

        timing.measure(self.config, self.recipe, points, out / TIMING)

    def report(self, points: Sequence[AdaptPoint], out: Path) -> list[Path]:
        from tools.sweep.adapt import report

        return report.write(self.config, points, out)

    def _questions(self) -> list[Question]:
        """Those that models are judged by.

        Raises:
            ConfigError: they, those of training or those that thresholds are tuned by have no image among them.
        """
        config, folder = self.config, Path(self.config.data)
        questions = read_questions(folder, config.test.split)[: config.test.samples]
        asked = {"train": read_questions(folder, "train"), "test": questions}
        asked["threshold"] = read_questions(folder, config.threshold.split)
        for section, found in asked.items():
            if not any(question.images for question in found):
                raise ConfigError(
                    f"{section}: no question of {config.data!r} taken for it has an image; give data that have"
                )
        return questions

    def _ranked(self, path: Path) -> dict[str, Any]:
        """ARank of the base, from `path`, or measured and written there with its picture."""
        from pretrain.finetune import arank

        config = self.config
        if path.exists():
            return arank.read(path)
        asked = {**arank.MEASURING, **config.arank.model_dump()}
        result = arank.measure(config.base, Path(config.data), asked)
        arank.propose(result, None, None, None, 0.5, config.last_layer)
        arank.draw(result, path.with_suffix(".png"))
        write_json(path, result)
        return result


def base_recipe(config: SweepConfig) -> dict[str, Any]:
    """The fine-tuning that all runs share, as a recipe's data.

    Raises:
        ConfigError: it is none.
    """
    sections = ("optimizer", "schedule", "train", "evaluate")
    data = recipes.read(config.recipe, over={section: getattr(config, section) for section in sections})
    data.pop("adapt", None)
    data |= {"base": config.base, "data": {**(data.get("data") or {}), "path": config.data}}
    recipe = FinetuneRecipe.parse(data)
    recipes.check_batches(recipe.train)
    return recipe.dump()


def digest(base: Path) -> str:
    """sha256 of a model's weights as its folder holds them."""
    found = hashlib.sha256()
    for path in sorted((*base.glob("*.safetensors"), *base.glob("*.bin"))):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
