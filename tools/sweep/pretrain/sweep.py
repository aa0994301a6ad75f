"""A sweep over pretrainings: arms × sizes × seeds, all compared with a baseline; see `kind.Sweep`."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pretrain import document_losses, second_stage
from pretrain import recipe as recipes
from tools.sweep.kind import Result
from tools.sweep.pretrain import plan, settings
from tools.sweep.pretrain.curves import losses
from tools.sweep.pretrain.plan import PretrainPoint
from tools.sweep.pretrain.run import STAGES, work
from tools.sweep.pretrain.settings import SweepConfig

FREE = {
    "arms",
    "sizes",
    "seeds",
    "jobs",
    "keep_models",
    "baseline",
    "compare",
    "match",
    "vary",
    "steps",
    "over",
    "recipe",
}
"""Keys that may change between two calls for one folder; of a finished run its own recipe may not."""

KEPT = ("recipe.yaml", "environment.json", "metrics.jsonl", f"{document_losses.FOLDER}/*.npz")
"""Files of a run folder that a report reads, or a reader of it might want."""


@dataclasses.dataclass(frozen=True)
class PretrainSweep:
    config: SweepConfig
    type: ClassVar[str] = "pretrain"
    free_settings: ClassVar[frozenset[str]] = frozenset({"keep_models", "point"})

    @property
    def jobs(self) -> int:
        return self.config.jobs

    @property
    def accelerators(self) -> int:
        return self.config.accelerators

    @classmethod
    def load(cls, data: Mapping[str, Any], folder: Path) -> PretrainSweep:
        return cls(settings.parse(data, folder))

    def shared(self) -> dict[str, Any]:
        return {"type": self.type, **self.config.model_dump(mode="json", exclude=FREE)}

    def plan_key(self) -> dict[str, Any]:
        said = self.config.model_dump(mode="json", exclude={"jobs", "keep_models"})
        return {"sweep": said, "recipe": recipes.read(self.config.recipe)}

    def plan(self, out: Path) -> list[PretrainPoint]:
        return plan.plan(self.config)

    def preview(self, points: Sequence[PretrainPoint]) -> str:
        return plan.show(self.config, {(point.arm, point.size): point.facts for point in points})

    @staticmethod
    def read_point(data: Mapping[str, Any]) -> PretrainPoint:
        return PretrainPoint.read(data)

    def settings(self, point: PretrainPoint, folder: Path) -> dict[str, Any]:
        steps = plan.steps_of(self.config, point.arm, point.size)
        found = []
        for stage in plan.stages(self.config, point.arm, point.size, steps):
            run = folder / STAGES[stage.kind]
            said = {"kind": stage.kind, "overrides": [], "recipe": {}, "steps": 0}
            if stage.kind == "routers":
                train = stage.recipe.get("train", {})
                said |= {"overrides": plan.overrides(stage.recipe), "steps": train.get("steps", second_stage.STEPS)}
            else:
                recipe = recipes.resolve({**stage.recipe, "seed": point.seed, "run_dir": str(run)})
                said |= {"recipe": recipe.dump(), "steps": recipe.train.steps}
            found.append(said)
        return {
            "point": dataclasses.asdict(point),
            "stages": found,
            "accelerators": self.config.accelerators,
            "keep_models": self.config.keep_models,
        }

    def discard(self, folder: Path) -> None:
        for name in STAGES.values():
            shutil.rmtree(folder / name, ignore_errors=True)

    @classmethod
    def run(cls, folder: Path, settings: dict[str, Any]) -> Result:
        return work(folder, settings)

    def kept(self, folder: Path) -> list[Path]:
        return [file for name in STAGES.values() for path in KEPT for file in sorted(folder.glob(f"{name}/{path}"))]

    def summary(self, result: Result) -> str:
        found = losses(result["last"])
        return "causal validation loss " + ", ".join(f"{name} {value:.4f}" for name, value in found.items())

    def measure(self, points: Sequence[PretrainPoint], out: Path) -> None:
        pass

    def report(self, points: Sequence[PretrainPoint], out: Path) -> list[Path]:
        from tools.sweep.pretrain import report, study

        return report.write(study.of_sweep(self.config, points, out), out)
