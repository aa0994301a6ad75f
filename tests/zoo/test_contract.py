"""Promises of blocks: ours keep them, and each way to break one is found and named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from pretrain import recipe as recipes
from tests.pretrain.runs import write_recipe
from tools.check import main
from zoo import BlockConfig, Cost, FeedForward, Mixer, ModelConfig, register
from zoo.contract import examine, narrowed
from zoo.registry import _tables

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def _blocks_of_a_test_are_gone_again(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for slot, table in _tables.items():
        monkeypatch.setitem(_tables, slot, dict(table))
    yield


def examined(layer: dict[str, Any], **changes: Any) -> dict[tuple[str, str], str]:
    """(key, promise) → fault of what is broken."""
    config = {"modalities": ["text", "image"], "d_model": 16, "vocab_size": 50, "layers": [layer], **changes}
    objective = zoo.registry.parse_block("objective", {"type": "autoregressive"}, "objective")
    findings = examine(ModelConfig.parse(config, "model"), objective)
    assert len(findings) >= 10
    return {(finding.key, finding.promise): finding.fault for finding in findings if finding.fault}


ATTENTION = {"mixer": {"type": "attention", "heads": 2}}


class Plain(FeedForward):
    """y = x W, as a block should be."""

    class Config(BlockConfig):
        pass

    def __init__(self, config: Any, place: Any) -> None:
        super().__init__()
        self.map = zoo.layers.Linear(place.d_model, place.d_model)

    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        return self.map(x)

    def cost(self, length: float, load: Any = None) -> Cost:
        return Cost.matmul(self.map.weight.numel())


def with_block(block: type[FeedForward]) -> dict[tuple[str, str], str]:
    register("feedforward", "mine")(block)
    return examined({**ATTENTION, "feedforward": {"type": "mine"}})


def test_a_block_that_keeps_them() -> None:
    class Mine(Plain):
        class Config(BlockConfig):
            pass

    assert with_block(Mine) == {}


class Dropout(Plain):
    def __init__(self, config: Any, place: Any) -> None:
        super().__init__(config, place)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        return self.map(self.dropout(x))


def test_torchs_randomness_is_kept_for_blocks_that_do_not_say_otherwise() -> None:
    class Honest(Dropout):
        class Config(BlockConfig):
            pass

    assert with_block(Honest) == {}


def test_a_false_word_about_noise_is_found() -> None:
    class Liar(Dropout, counter_noise=True):
        class Config(BlockConfig):
            pass

    broken = with_block(Liar)
    fault = broken["model.layers[0].feedforward", "recomputed the same"]
    assert "leave counter_noise=True away, or draw by zoo.noise" in fault
    assert {promise for _, promise in broken} == {"recomputed the same"}


class Ahead(Plain):
    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        return self.map(x + x.roll(-1, 1) * context.valid.unsqueeze(-1))


class Idle(Plain):
    """Runs images' weights where there are images alone."""

    def __init__(self, config: Any, place: Any) -> None:
        super().__init__(config, place)
        self.images = zoo.layers.Linear(place.d_model, place.d_model)

    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        y = self.map(x)
        return y + self.images(x) if context.totals[1] else y


class Bias(Plain):
    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        return self.map(x) + 1


class TwoCosts(Plain):
    def cost(self, length: float, load: Any = None) -> Cost:
        return Cost((1.0, 1.0), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0))


class NoCost(Plain):
    def cost(self, length: float, load: Any = None) -> Cost:
        return Cost.matmul(2, self.map.weight.numel())  # type: ignore[call-arg]


class TooMuch(Plain):
    def cost(self, length: float, load: Any = None) -> Cost:
        return Cost.matmul(2 * self.map.weight.numel())


class Wide(Plain):
    def forward(self, x: Any, context: Any, state: Any = None) -> Any:
        return torch.cat([self.map(x)] * 2, -1)


BROKEN: dict[str, tuple[type[Plain], str, str]] = {
    "looks ahead": (Ahead, "causal", "what stands at t ≥ "),
    "sees the next document": (Ahead, "documents apart", "a document sees another"),
    "leaves weights out": (Idle, "every parameter in every step", "images.weight is not joined to the output where a"),
    "padding": (Bias, "shapes", "gives something at padding"),
    "two modalities": (TwoCosts, "cost", "for 1 modalities its cost is (1.0, 1.0)"),
    "old form of cost": (NoCost, "cost", "raises TypeError"),
    "more than there is": (TooMuch, "cost", "active parameters, and has"),
    "another shape": (Wide, "shapes", "gives (3, 20, 32) torch.float64 for (3, 20, 16)"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_breaks_a_promise_is_named(what: str) -> None:
    block, promise, fault = BROKEN[what]
    config = type("Config", (BlockConfig,), {"__module__": __name__})
    broken = with_block(type("Mine", (block,), {"Config": config}))
    assert fault in broken["model.layers[0].feedforward", promise]
    assert not any(key.endswith("mixer") for key, _ in broken)


def test_a_state_that_forgets_is_found() -> None:
    @register("mixer", "forgetful")
    class Forgetful(Mixer):
        """The sum of the token and the one before it; its state remembers nothing."""

        class Config(BlockConfig):
            pass

        def __init__(self, config: Any, place: Any) -> None:
            super().__init__()
            self.map = zoo.layers.Linear(place.d_model, place.d_model)

        def forward(self, x: Any, context: Any, state: Any = None) -> Any:
            before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
            same = torch.zeros_like(context.valid)
            same[:, 1:] = (context.document[:, 1:] == context.document[:, :-1]) & context.valid[:, 1:]
            return self.map(x + before * same.unsqueeze(-1))

        def init_state(self, rows: int, length: int, like: Any) -> None:
            return None

        def cost(self, length: float, load: Any = None) -> Cost:
            return Cost.matmul(self.map.weight.numel())

    broken = examined({"mixer": {"type": "forgetful"}})
    assert {key for key, promise in broken if promise == "cached = uncached"} == {
        "model.layers[0].mixer",
        "model.layers[0]",
        "model",
    }
    assert {promise for _, promise in broken} == {"cached = uncached"}


TRIED = ["tiny/mod.yaml", "tiny/transfusion.yaml", "tiny/mixture_of_mamba.yaml", "tiny/mixer_gate.yaml"]


@pytest.mark.parametrize("name", TRIED)
def test_our_blocks_keep_them(name: str) -> None:
    recipe = recipes.load(RECIPES / name, ["data.path=nowhere"])
    findings = examine(recipe.model, recipe.objective, recipe.bidirectional, recipe.kernels)
    assert {(finding.key, finding.promise): finding.fault for finding in findings if finding.fault} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_recipes_keep_them() -> None:
    broken = {}
    for path in [*sorted((RECIPES / "tiny").glob("*.yaml")), RECIPES / "quickstart.yaml"]:
        recipe = recipes.load(path, ["data.path=nowhere"])
        findings = examine(recipe.model, recipe.objective, recipe.bidirectional, recipe.kernels)
        broken |= {(path.name, each.key, each.promise): each.fault for each in findings if each.fault}
    assert broken == {}


def test_a_large_model_is_made_small() -> None:
    recipe = recipes.load(RECIPES / "models" / "mod_moma_4t4i_1.4b.yaml", ["data.path=nowhere"])
    small = narrowed(recipe.model)
    assert small.d_model < 200 < recipe.model.d_model and len(small.pattern()) <= 4 and small.vocab_size == 64
    assert len({layer.model_dump_json() for layer in small.layers}) == len(small.layers)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    class Mine(Ahead):
        class Config(BlockConfig):
            pass

    register("feedforward", "mine")(Mine)
    for kind, code in (({"type": "dense", "d_ff": 8}, 0), ({"type": "mine"}, 1)):
        layer = {**ATTENTION, "feedforward": kind}
        file = write_recipe(tmp_path, "nowhere", tmp_path / "run", model={"d_model": 16, "layers": [layer]})
        assert main([str(file), "--run"]) == code
        printed = capsys.readouterr().out
        assert ("model.layers[0].feedforward: BROKEN: causal: what stands at" in printed) == bool(code)
        assert "model.layers[0].mixer: shapes, documents apart, causal, cached = uncached" in printed
