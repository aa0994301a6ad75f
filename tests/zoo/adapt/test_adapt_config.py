"""AdaptConfig: what is refused and why, plans for any depth, the three methods as they are shipped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from zoo.adapt import AdaptConfig
from zoo.config import ConfigError

RECIPES = Path(__file__).parents[3] / "recipes" / "adapt"
HALF = {"type": "constant", "value": 0.5}


def parse(**changes: Any) -> AdaptConfig:
    return AdaptConfig.parse({"layers": [1, 3], "capacity": HALF} | changes, "adapt")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layers": [0, 2]}, r"^adapt\.layers: \[0, 2\]: layer 0 stays dense: .* leave it out$"),
        ({"layers": [-1]}, r"adapt\.layers: .*counted from 0 upwards"),
        ({"layers": [3, 1]}, r"adapt\.layers: .*ascending"),
        ({"layers": []}, r"adapt\.layers: .*no layer is named"),
        ({"layers": {"first": 0}}, r"^adapt\.layers\.rule\.first: 0: must be greater than or equal to 1$"),
        (
            {"capacity": {"type": "constant", "value": 0}},
            r"^adapt\.capacity\.constant\.value: 0: must be above 0 and at most 1$",
        ),
        (
            {"capacity": {"type": "list", "values": [0.5, 0]}},
            r"^adapt\.capacity\.list\.values\[1\]: 0: must be above 0",
        ),
        (
            {"capacity": {"type": "progressive", "floor": 0}},
            r"^adapt\.capacity\.progressive\.floor: 0: must be above 0",
        ),
        ({"capacity": {"type": "constant", "value": 1.5}}, r"above 0 and at most 1"),
        (
            {"capacity": {"type": "constant", "keep": 0.5}},
            r"^adapt\.capacity\.constant: keep is called value now; write value: 0\.5$",
        ),
        ({"capacity": {"type": "list", "keep": [0.5, 1.0]}}, r"list: keep is called values now; write values: \[0\.5"),
        ({"capacity": {"type": "cosine"}}, r"adapt\.capacity.*constant.*progressive"),
        ({"capacity": {"type": "list", "values": [0.5]}}, r"as many entries as layers"),
        ({"candidates": "images"}, r"adapt\.candidates: 'images': must be 'image', 'image_and_answer' or 'video'"),
        ({"gate": {"activation": "none"}}, r"no router learns"),
        ({"gate": {"activation": "softmax", "tanh_scale": 0.2}}, r"tanh_scale has no meaning"),
        ({"inference": {"rule": "threshold"}}, r"give the threshold"),
        ({"inference": {"threshold": 0.5}}, r"nothing uses it"),
        ({"router": {"type": "random", "shared": True}}, r"adapt\.router: .*shared has no meaning under type 'random'"),
        ({"router": {"seed": 3}}, r"seed has no meaning under type 'linear'"),
        ({"router": {"type": "attention"}}, r"gate\.activation is softmax, but a router of type attention"),
        (
            {"router": {"type": "random"}, "gate": {"activation": "none"}, "auxiliary": {"type": "membership"}},
            r"set auxiliary\.type: none",
        ),
        ({"router": {"share": True}}, r"adapt\.router\.share: unknown key.*did you mean 'shared'"),
    ],
)
def test_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


@pytest.mark.parametrize(
    "changes, depth, message",
    [
        (
            {"layers": [1, 4]},
            4,
            "^layers: 4 is out of range; the decoder has layers 0 to 3; leave it out, or give a rule",
        ),
        ({"layers": [1, 3]}, 4, "3 is the last layer"),
        ({"layers": {"first": 3, "leave_last": 1}}, 4, "no layer of 4 is left"),
    ],
)
def test_plans_refused(changes: dict[str, Any], depth: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes).plan(depth)


def test_plans() -> None:
    assert parse(layers={"every": 2}).plan(7) == {1: 0.5, 3: 0.5, 5: 0.5}
    assert list(parse(layers=[1, 3], last_layer=True).plan(4)) == [1, 3]
    without_weights = {"router": {"type": "random"}, "gate": {"activation": "none"}}
    assert list(parse(layers=[1, 3], **without_weights).plan(4)) == [1, 3], "no router is there to learn"
    by_layer = parse(capacity={"type": "list", "values": ["1/3", 1.0]}).plan(5)
    assert by_layer[1] * 3 == 1 and by_layer[3] == 1


@pytest.mark.parametrize("depth", [32, 24, 7])
def test_progressive_ratio_decay(depth: int) -> None:
    """½ cos(π i / (L − 1)) + ½, dense above 0.85, at least 0.15; 53.75 % of 32 layers, as p-MoD reports."""
    plan = AdaptConfig.parse(yaml.safe_load((RECIPES / "p_mod.yaml").read_text())["adapt"]).plan(depth)
    curve = [math.cos(math.pi * i / (depth - 1)) / 2 + 0.5 for i in range(depth)]
    assert set(plan) == {i for i, ratio in enumerate(curve) if ratio <= 0.85}
    for i, keep in plan.items():
        assert abs(float(keep) - max(0.15, curve[i])) < 1e-6
    if depth == 32:
        assert min(plan) == 8 and abs((sum(map(float, plan.values())) + depth - len(plan)) / depth - 0.5375) < 1e-4


@pytest.mark.parametrize("name", ["gamma_mod", "p_mod", "videollm_mod"])
def test_shipped(name: str) -> None:
    """Each is a plan for common depths, survives a round trip, and says where every number comes from."""
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "What it shows:" in text and "Command:" in text
    config = AdaptConfig.parse(yaml.safe_load(text)["adapt"], "adapt")
    assert AdaptConfig.parse(config.model_dump()) == config
    assert all(config.plan(depth) for depth in (24, 28, 32, 40))
    for line in text[text.index("adapt:") :].splitlines()[1:]:
        entry = line.partition("#")[0].strip()
        if entry and not entry.endswith(":") and "type: progressive" not in entry:
            assert any(source in line for source in ("code", "paper", "abstract", "unverified")), line
