"""`python -m tools.mixture`: merges, ranks, what is refused, and the whole on a tiny recipe."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.run_folder import load_model
from tests.pretrain.runs import ROOT
from tools.mixture import __main__ as command
from tools.mixture.merge import merged, simplex
from tools.mixture.report import agreement, score, write
from tools.mixture.run import Found, Tried
from tools.mixture.settings import MixtureConfig, normal, read
from zoo.config import ConfigError, UserError


def write_mixture(folder: Path, data: str, **changes: Any) -> Path:
    """A choice between the two sources of `recipes/tiny/mixture.yaml`, both with a tenth held out."""
    recipe = {
        "extends": str(ROOT / "recipes/tiny/mixture.yaml"),
        "data": {"path": data, "sources": {"few": {"validation": 0.1}}},
        "train": {"steps": 2, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 0, "device": "cpu"},
        "evaluate": {"rows": 4},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    path = folder / "choice.yaml"
    mixtures = [{"many": 1, "few": 1}, {"many": 3, "few": 1}, {"many": 1, "few": 3}]
    said = {"recipe": "recipe.yaml", "start_steps": 2, "parts": 2, "check": mixtures}
    path.write_text(yaml.safe_dump(said | changes, sort_keys=False))
    return path


def test_the_grid() -> None:
    found = simplex(["a", "b", "c"], 4)
    assert len(found) == 15 == len({tuple(each.values()) for each in found})
    assert all(sum(each.values()) == 1 and min(each.values()) >= 0 for each in found)
    assert {"a": 0.25, "b": 0.5, "c": 0.25} in found and {"a": 0, "b": 0, "c": 1} in found


def test_merging() -> None:
    """Exact at the corners, in double precision between; whole numbers are no mean of anything."""
    a = {"w": torch.tensor([1.0, 3.0]), "n": torch.tensor([2])}
    b = {"w": torch.tensor([2.0, 1e-8]), "n": torch.tensor([2])}
    whole = merged({"a": a, "b": b}, {"a": 0.0, "b": 1.0})
    assert torch.equal(whole["w"], b["w"]) and torch.equal(whole["n"], b["n"])
    assert merged({"a": a, "b": b}, {"a": 0.25, "b": 0.75})["w"].tolist() == pytest.approx([1.75, 0.75])
    with pytest.raises(UserError, match="b: n differs from that of a, and whole numbers have no mean"):
        merged({"a": a, "b": b | {"n": torch.tensor([3])}}, {"a": 0.5, "b": 0.5})
    with pytest.raises(UserError, match="b: its model is not that of a"):
        merged({"a": a, "b": {"w": torch.zeros(3), "n": a["n"]}}, {"a": 0.5, "b": 0.5})


def test_agreement() -> None:
    same = agreement([1, 2, 3, 4, 5], [10, 20, 30, 40, 50])
    assert (same.correlation, same.low, same.high) == pytest.approx((1, 1, 1))
    found = agreement([1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5])
    assert found.correlation == pytest.approx(0.8286, abs=1e-4) and found.low < 0.6 < found.high <= 1
    assert agreement([1, 2, 3], [3, 2, 1]).correlation == pytest.approx(-1)
    assert math.isnan(agreement([1, 2], [1, 2]).correlation)
    assert math.isnan(agreement([1, 1, 1], [1, 2, 3]).correlation), "equal scores have no rank"


def test_the_report(tmp_path: Path) -> None:
    """Ranked by the weights of the judge; corners are on the grid."""
    config = MixtureConfig(recipe="", start_steps=3, judge={"a": 3, "b": 1})
    tried = [Tried({"a": w, "b": 1 - w}, {"a": 2.0 - w, "b": 1.0 + w}) for w in (0.0, 0.25, 0.5, 0.75, 1.0)]
    trained = [Tried(each.weights, {name: 0.9 * loss for name, loss in each.losses.items()}) for each in tried[1:4]]
    assert score(tried[0], config.judge) == pytest.approx((3 * 2 + 1) / 4)
    written = write(config, Found(tried, trained, tried[1:4], Tried({}, {"a": 3.0, "b": 3.0})), tmp_path)
    text = written[0].read_text()
    assert text.index("| 1 | 0 | 1.0000 | 2.0000 | 1.2500 |") < text.index("| 0.75 | 0.25 | 1.2500 | 1.7500 | 1.3750 |")
    assert "| mean | 1.00 | 1.00 to 1.00 |" in text and "over 3 mixtures" in text and written[1].exists()
    assert write(config, Found(tried, [], [], tried[0]), tmp_path)[0].read_text().count("##") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"check": [{"many": 1}]}, r"check\[0\]: .* has one source; its merge is the run itself"),
        ({"check": [{"many": 1, "fev": 1}]}, r"check\[0\].fev: is no source; they are many, few .did you mean 'few'"),
        ({"judge": {"few": -1}}, "judge.few: -1.0 is negative"),
        ({"over": {"data": {"token_ratio": {"text": 1, "image": 1}}}}, "data.token_ratio: sets the weights"),
        ({"over": {"data": {"sources": None}}}, "sources"),
        ({"parts": 1}, "parts"),
    ],
    ids=["one", "unknown", "negative", "ratio", "none", "parts"],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(write_mixture(tmp_path, "data", **changes))


def test_weights_become_shares() -> None:
    assert normal({"b": 2, "a": 6}, ["a", "b", "c"]) == {"a": 0.75, "b": 0.25, "c": 0.0}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_from_the_file_to_the_report(digit_shards: Path, tmp_path: Path) -> None:
    """Start, a run a source, checked mixtures; a second call trains nothing, and a corner is the run itself."""
    path, out = write_mixture(tmp_path, str(digit_shards)), tmp_path / "out"
    assert command.main([str(path), str(out)]) == 0
    text = (out / "report.md").read_text()
    assert "over 3 mixtures" in text and (out / "ranks.png").exists()
    runs = sorted(folder.name for folder in (out / "runs").iterdir() if folder.is_dir())
    assert runs == ["check-0", "check-1", "check-2", "only-few", "only-many", "start"]
    start, only = (load_model(out / "runs" / name)[0].state_dict() for name in ("start", "only-few"))
    assert any(not torch.equal(start[key], only[key]) for key in start)
    times = [(out / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in runs]
    losses = json.loads((out / "losses.json").read_text())
    (out / "losses.json").unlink()
    assert command.main([str(path), str(out)]) == 0
    assert times == [(out / "runs" / name / "model.safetensors").stat().st_mtime_ns for name in runs]
    assert json.loads((out / "losses.json").read_text()) == losses and (out / "report.md").read_text() == text
