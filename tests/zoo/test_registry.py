"""A user's block stands beside ours: registered, configured, built, trained, decoded, counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from pydantic import Field

import zoo
from tests.zoo.helpers import ATTENTION, build_model, columns, ids, layer, mod, stream
from zoo import BlockConfig, ConfigError, Cost, Place, TokenContext, register, registry


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_tables", copy.deepcopy(registry._tables))


class Gain(torch.nn.Module):
    """A feed-forward of one factor a channel: what a first block of a user may look like."""

    class Config(BlockConfig):
        start: float = Field(0.5, gt=0)

        def check(self, place: Place, path: str) -> None:
            if place.d_model > 64:
                raise ConfigError(f"{path}: d_model {place.d_model} is above 64; make the model narrower")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.start, self.modalities = config.start, len(place.modalities)
        self.factor = torch.nn.Parameter(torch.empty(place.d_model))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(self.start)

    def forward(self, x: torch.Tensor, context: TokenContext, state: None = None) -> torch.Tensor:
        return x * self.factor

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        return Cost.of(self.modalities, active=self.factor.numel())


GAIN = {"type": "gain", "start": 0.25}


def test_a_registered_block_builds_trains_decodes_and_is_counted():
    register("feedforward", "gain")(Gain)
    model = build_model(layer(feedforward=GAIN), mod(feedforward=GAIN))
    assert zoo.known("feedforward")[-1] == "gain"
    assert (model.layers[0].feedforward.factor == 0.25).all()
    context = stream("ttiitti", "tii", routing="topk")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        losses.append(model(ids(context), context).logsumexp(-1).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all((one.feedforward.factor != 0.25).all() for one in (model.layers[0], model.layers[1].block))

    model.eval()
    causal, tokens, states = context.replace(routing="causal"), ids(context), model.init_state(2, 7)
    with torch.no_grad():
        parts = [model(tokens[:, t : t + 1], columns(causal, t, t + 1), states) for t in range(7)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens, causal), rtol=0, atol=1e-10)
    without = build_model({"mixer": ATTENTION})
    with_gain = build_model({"mixer": ATTENTION, "feedforward": GAIN})
    assert with_gain.cost(7).active[0] - without.cost(7).active[0] == 8 + 8  # and its norm


def test_its_config_is_checked_like_ours():
    register("feedforward", "gain")(Gain)
    for options, message in {
        (("start", -1),): "model.layers[0].feedforward.start: -1: must be greater than 0",
        (("stat", 1),): "model.layers[0].feedforward.stat: unknown key; known: start (did you mean 'start'?)",
    }.items():
        with pytest.raises(ConfigError) as error:
            build_model(layer(feedforward=GAIN | dict(options)))
        assert str(error.value) == message
    with pytest.raises(ConfigError, match="^feedforward: d_model 128 is above 64"):
        zoo.build("feedforward", GAIN, d_model=128)


def test_a_taken_name_is_refused_and_the_same_class_may_register_again():
    register("feedforward", "gain")(Gain)
    register("feedforward", "gain")(Gain)  # a module imported twice

    class Other(Gain):
        class Config(BlockConfig):
            pass

    with pytest.raises(ConfigError, match=r"^register: feedforward 'gain' is taken by .*Gain; choose another$"):
        register("feedforward", "gain")(Other)
    with pytest.raises(ConfigError, match="^register: feedforward 'dense' is taken by zoo.feedforward.Dense; choose"):
        register("feedforward", "dense")(Gain)


def test_a_block_without_a_config_or_a_slot_is_refused():
    with pytest.raises(ConfigError, match=r"^register: slot 'ffn' is not known; slots: mixer, feedforward,"):
        register("ffn", "gain")
    with pytest.raises(ConfigError, match=r"^register: Linear has no nested `class Config\(BlockConfig\)`; add one$"):
        register("feedforward", "linear")(torch.nn.Linear)


def test_a_subclass_that_keeps_its_parents_config_leaves_the_parent_as_it_was():
    register("feedforward", "gain")(Gain)

    class Louder(Gain):
        pass

    register("feedforward", "louder")(Louder)
    for name, cls in {"gain": Gain, "louder": Louder}.items():
        block = zoo.build("feedforward", {"type": name}, d_model=8)
        assert type(block) is cls
        assert registry.parse_block("feedforward", {"type": name}, "").model_dump()["type"] == name


def test_a_config_of_another_slot_is_refused():
    attention = registry.parse_block("mixer", ATTENTION, "mixer")
    with pytest.raises(ConfigError, match=r"^model.layers\[0\].feedforward"):
        build_model({"mixer": attention, "feedforward": attention})


@pytest.mark.parametrize("slot", ["depth", "router"])
def test_a_block_that_stands_only_inside_others_is_not_built_alone(slot):
    with pytest.raises(ConfigError, match=slot):
        zoo.build(slot, {"type": zoo.known(slot)[0]}, d_model=8)
