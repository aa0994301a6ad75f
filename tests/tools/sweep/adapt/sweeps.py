"""Settings of sweeps for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tools.sweep.adapt.settings import SweepConfig

RECIPES = Path(__file__).parents[4] / "recipes" / "adapt"
ARMS = {
    "dense": {},
    **{rule: {"recipe": str(RECIPES / "gamma_mod.yaml"), "layers": rule} for rule in ("arank", "random", "alternate")},
    "p_mod": {"recipe": str(RECIPES / "p_mod.yaml"), "solve": "centre"},
    "fastv": {"adapt": {"layers": {"first": 2}, "group": "sample"}, "tokens": "attention", "train": False},
    "blind": {"recipe": str(RECIPES / "gamma_mod.yaml"), "layers": "arank", "tokens": "random", "train": False},
}


def config(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """A dense control and γ-MoD with layers of lowest ARank, of a base and data in `tmp_path`."""
    return {
        "type": "adapt",
        "base": str(tmp_path),
        "data": str(tmp_path),
        "recipe": str(RECIPES.parent / "examples" / "digits_tuning.yaml"),
        "targets": [0.7],
        "arms": {"dense": {}, "arank": {"recipe": str(RECIPES / "gamma_mod.yaml"), "layers": "arank"}},
    } | changes


def parsed(tmp_path: Path, **changes: Any) -> SweepConfig:
    """`config` as it is read, its paths as they stand."""
    return SweepConfig.parse({key: value for key, value in config(tmp_path, **changes).items() if key != "type"})


def write_sweep(folders: Path, name: str, **changes: Any) -> Path:
    """A sweep of few and short runs, of `base` and `data` in `folders`; with `changes`, one level deep."""
    sweep = config(
        folders,
        base=str(folders / "base"),
        data=str(folders / "data"),
        tolerance=0.05,
        seeds=[0],
        targets=[0.85],
        test={"split": "validation", "samples": 8, "batch": 3},
        threshold={"samples": 4, "rounds": 4},
        arank={"samples": 2, "batch": 2},
        timing={"batch": 2, "rounds": 5},
        schedule={"warmup_steps": 0},
        evaluate={"samples": 2, "generate": False},
        train={
            "steps": 3,
            "global_batch": 2,
            "micro_batch": 2,
            "device": "cpu",
            "evaluate_every": 0,
            "checkpoint_every": 1,
            "log_every": 5,
        },  # no step is logged, nor its seconds
    )
    path = folders / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sweep | changes))
    return path
