"""The command: a whole folder, its card, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.pretrain.runs import environment
from tests.zoo.hf.exports import opened, write_run
from tests.zoo.test_generate import ATTENTION
from tools import export


def test_zoo_needs_no_transformers() -> None:
    code = "import sys, zoo; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


def test_a_run_is_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", "ids", "sparse")
    lines = [
        {"step": 1, "loss": 9.0},
        {"step": 2, "tokens": 1234, "flops": 5e9, "eval/causal/loss": 1.25, "eval/topk/loss": 1.125},
        {"step": 3, "loss": 8.0},
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16", "--shard-gb", "5e-6"]) == 0
    printed = capsys.readouterr().out
    assert "ZooForCausalLM" in printed and "AutoTokenizer opens it, too" in printed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| objective | 1.2500 | 1.1250 |" in card and "after step 2, 1,234 tokens and 5e+09 FLOPs" in card
    assert "no document longer than 40 tokens" in card and "`somewhere`" in card and str(tmp_path) not in card
    model, _ = opened(tmp_path, torch.bfloat16)
    for name, value in run.model.state_dict().items():
        assert torch.equal(model.state_dict()[f"model.{name}"], value.to(model.state_dict()[f"model.{name}"].dtype))
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 16000


def test_what_cannot_be_exported_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blind = ATTENTION | {"depth": {"type": "mod", "capacity": 0.5, "auxiliary": False}}
    write_run(tmp_path / "blind", "ids", [blind])
    write_run(tmp_path / "run", "ids")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    write_run(tmp_path / "other", "ids")
    recipe = yaml.safe_load((tmp_path / "other" / "recipe.yaml").read_text())
    recipe["model"]["layers"] *= 2
    (tmp_path / "other" / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(recipe))))
    own = recipe | {"imports": ["blocks_that_nobody_named"]}
    write_run(tmp_path / "own", "ids")
    (tmp_path / "own" / "recipe.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(own))))
    write_run(tmp_path / "unended", "ids")
    (tmp_path / "unended" / "model.safetensors").unlink()
    for arguments, reason in [
        (["blind", "out"], "no auxiliary router; train them"),
        (["run", "full"], "full: exists; give a new folder"),
        (["nowhere", "out"], "recipe.yaml: does not exist; give the folder of a run"),
        (["other", "out"], "of the recipe's model is not there"),
        (["own", "out"], "runs no code of itself"),
        (["unended", "out"], "holds no complete checkpoint"),
        (["run", "out", "--checkpoint", "step-7"], "--checkpoint: 'step-7' is none of none in"),
        (["run", "out", "--shard-gb", "0"], "--shard-gb: 0.0; give a size above 0"),
    ]:
        paths = [str(tmp_path / name) for name in arguments[:2]]
        assert export.main([*paths, *arguments[2:]]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ") and reason in printed and printed.count("\n") == 1
        assert not (tmp_path / "out").exists()
