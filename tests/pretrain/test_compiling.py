"""`train.compile`: what is refused, and that a compiled run trains and resumes as an uncompiled one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain import metrics
from pretrain import recipe as recipes
from tests.pretrain.runs import LAYER, ROOT, tiny_recipe
from zoo import ConfigError

COMPILED = """
import sys
import pretrain.compiling
from torch._dynamo.testing import CompileCounterWithBackend
pretrain.compiling.BACKEND = counter = CompileCounterWithBackend("aot_eager")
from pretrain.train import main
code = main([sys.argv[1]])
print("graphs", counter.frame_count)
sys.exit(code)
"""


DEPTH = {"type": "mod", "capacity": 0.5}
TOKEN_CHOICE = {"type": "experts", "experts": 2, "d_ff": 32, "router": {"type": "token_choice"}}


def layers(**second: Any) -> dict[str, Any]:
    """MoMa, and a dense layer under Mixture-of-Depths."""
    dense = LAYER | {"feedforward": {"type": "dense", "d_ff": 32}, "depth": DEPTH}
    return {"d_model": 32, "layers": [dict(LAYER), dense | second]}


def changed(second: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    recipe = tiny_recipe("data", "run", model=layers(**second or {}))
    return recipe | {"train": recipe["train"] | {"compile": True} | train}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (changed(activation_checkpointing=True), r"train\.activation_checkpointing: does not go with train\.compile"),
        (changed() | {"kernels": {"attention": "per_document"}}, r"kernels\.attention: 'per_document'.*use auto"),
        (changed() | {"deepspeed": {"zero_optimization": {"stage": 3}}}, r"zero_optimization\.stage: 3"),
        (changed() | {"deepspeed": {"compile": {"deepcompile": True}}}, r"deepspeed\.compile: .*train\.compile: true"),
        (changed({"mixer": {"type": "mamba"}}), r"layers\[1\]\.mixer\.type: 'mamba' does not go with train\.compile"),
        (changed({"feedforward": TOKEN_CHOICE}), r"layers\[1\]\.feedforward\.router\.type: 'token_choice'"),
        (changed({"depth": DEPTH | {"scope": "microbatch"}}), r"layers\[1\]\.depth: only one capacity .*scope: row"),
        (changed({"depth": DEPTH | {"capacity": {"text": 1.0, "image": 0.5}}}), r"layers\[1\]\.depth: only one"),
        (changed({"feedforward": LAYER["feedforward"]}), r"layers\[1\]\.depth: .*treats modalities apart"),
    ],
)
def test_what_cannot_be_compiled_is_refused(recipe: dict[str, Any], message: str) -> None:
    recipes.launch_config(recipes.resolve(changed()), 1)
    with pytest.raises(ConfigError, match=message):
        recipes.launch_config(recipes.resolve(recipe), 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_compiled_run_is_the_run(stage: int, digit_shards: Path, tmp_path: Path) -> None:
    """Losses are those of the uncompiled run, also where the run stops and goes on, by at most three graphs."""

    def run(name: str, steps: int, compiled: bool) -> str:
        recipe = tiny_recipe(
            digit_shards, tmp_path / name, model=layers(), deepspeed={"zero_optimization": {"stage": stage}}
        )
        recipe["train"] |= {"compile": compiled, "steps": steps}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        command = ["-c", COMPILED] if compiled else ["-m", "pretrain.train"]
        arguments = [sys.executable, *command, str(tmp_path / f"{name}.yaml")]
        return subprocess.run(arguments, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout

    def losses(name: str) -> list[float]:
        return [line["loss"] for line in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in line]

    run("plain", 6, False)
    for steps in (3, 6):
        said = run("compiled", steps, True)
        assert int(said.split("graphs ")[-1]) <= 3
    assert len(losses("plain")) == 6
    assert losses("compiled") == pytest.approx(losses("plain"), rel=1e-6)
