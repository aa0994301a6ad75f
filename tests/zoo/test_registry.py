"""A user's block stands beside ours: registered, configured, built, trained, decoded, counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from pydantic import Field

import zoo
from tests.zoo.helpers import ATTENTION, assert_equal, build_model, columns, ids, layer, mod, stream
from zoo import BlockConfig, ConfigError, Cost, FeedForward, Place, TokenContext, register, registry
from zoo.recompute import counter_noise_alone


@pytest.fixture(autouse=True)
def _own_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_tables", copy.deepcopy(registry._tables))


class Gain(FeedForward):
    """A feed-forward of one factor a channel: what a first block of a user may look like."""

    class Config(BlockConfig):
        start: float = Field(0.5, gt=0)

        def check(self, place: Place, path: str) -> None:
            if place.d_model > 64:
                raise ConfigError(f"{path}: d_model {place.d_model} is above 64; make the model narrower")

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__()
        self.start = config.start
        self.factor = torch.nn.Parameter(torch.empty(place.d_model))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(self.start)

    def forward(self, x: torch.Tensor, context: TokenContext, state: None = None) -> torch.Tensor:
        return x * self.factor

    def cost(self, length: float, load: Mapping[str, float] | None = None) -> Cost:
        return Cost.of(active=self.factor.numel())


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

    class Bare(FeedForward):
        pass

    with pytest.raises(ConfigError, match=r"Bare has no nested `class Config\(BlockConfig\)`; add one$"):
        register("feedforward", "bare")(Bare)

    class Smell(zoo.Modality):
        class Config(BlockConfig):  # pyrefly: ignore[bad-override]
            pass

    with pytest.raises(ConfigError, match=r"Smell has no nested `class Config\(ModalityConfig\)`; add one$"):
        register("modality", "smell")(Smell)


@pytest.mark.parametrize("slot", ["mixer", "depth", "objective"])
def test_a_block_that_promises_nothing_is_refused(slot):
    base = f"zoo.slots.{registry.SLOTS[slot].__name__}"
    with pytest.raises(ConfigError) as error:
        register(slot, "gain")(Gain)
    assert str(error.value) == (
        f"register: Gain does not derive from the base of the slot {slot}; write `class Gain({base})`"
    )


def test_what_a_block_leaves_out_is_named_when_it_is_needed():
    class Bare(zoo.Mixer):
        class Config(BlockConfig):
            pass

        def __init__(self, config: Config, place: Place) -> None:
            super().__init__()

    register("mixer", "bare")(Bare)
    block = zoo.build("mixer", {"type": "bare"}, d_model=8)
    context = stream("ti")
    for missing, call in {
        "forward": lambda: block(torch.zeros(1, 2, 8), context),
        "init_state": lambda: block.init_state(1, 2, torch.zeros(1)),
        "cost": lambda: block.cost(2),
    }.items():
        with pytest.raises(NotImplementedError, match=f"^Bare has no {missing}"):
            call()


class Dropped(Gain):
    """A user's block with torch's own randomness, and one that shows which numbers were drawn."""

    class Config(BlockConfig):
        pass

    def __init__(self, config: Config, place: Place) -> None:
        super().__init__(Gain.Config(), place)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, context: TokenContext, state: None = None) -> torch.Tensor:
        return self.dropout(super().forward(x, context)) * torch.rand(x.shape[-1], dtype=x.dtype)


@pytest.mark.parametrize("wrapped", [layer, mod], ids=["layer", "mod"])
def test_torch_randomness_of_a_block_is_drawn_again_as_it_was(wrapped):
    """Activation checkpointing changes no gradient, whatever a user's block draws in the forward pass."""
    register("feedforward", "dropped")(Dropped)
    context, grads = stream("ttiitti", "tii", routing="topk"), []
    for checkpointing in (False, True):
        config = wrapped(feedforward={"type": "dropped"}, repeat=2)
        model = build_model(config, activation_checkpointing=checkpointing).train()
        torch.manual_seed(0)
        loss = model(ids(context), context).logsumexp(-1).square().mean()
        loss.backward()
        grads.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    assert_equal(*grads)
    assert grads[0]["layers.0.feedforward.factor" if wrapped is layer else "layers.0.block.feedforward.factor"].any()


def test_only_a_class_that_says_so_is_recomputed_without_torchs_random_state():
    class Quiet(Gain, counter_noise=True):
        pass

    class Heir(Quiet):
        pass

    assert (Gain.counter_noise, Quiet.counter_noise, Heir.counter_noise) == (False, True, False)
    register("feedforward", "gain")(Gain)
    ours, theirs = build_model(layer(), mod()), build_model(layer(feedforward=GAIN), mod(feedforward=GAIN))
    assert all(map(counter_noise_alone, ours.layers)) and not any(map(counter_noise_alone, theirs.layers))


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


class Largest(zoo.Scorer):
    """Scores a token by its largest entry."""

    class Config(BlockConfig):
        pass

    def __init__(self, config: Config, place: Place, outputs: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.empty(outputs))

    def initialise(self, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
        parameter.fill_(1.0)

    def forward(self, x: torch.Tensor, candidates: object = None) -> torch.Tensor:
        return x.amax(-1, keepdim=True) * self.scale


def test_a_registered_scorer_serves_depth_and_experts():
    register("router", "largest")(Largest)
    router = {"type": "largest"}
    experts = {"type": "experts", "experts": 2, "d_ff": 12, "router": router, "scope": "row"}
    depth = {"type": "mod", "capacity": "1/2", "router": router}
    model = build_model(layer(depth=depth, feedforward=experts), layer(feedforward=experts))
    context = stream("ttiitti", "tii....", trace=zoo.Trace())
    x = torch.randn(*context.shape, 8, dtype=torch.float64)
    model.layers[0](x, context)
    kept = context.trace.decisions["layers.0"].selection.kept
    for row, count in enumerate((4, 2)):
        best = x[row].amax(-1).masked_fill(~context.valid[row], -torch.inf).topk(count).indices
        assert kept[row].nonzero()[:, 0].tolist() == sorted(best.tolist())
    loss = model(ids(context), context).square().mean()
    scales = [p for name, p in model.named_parameters() if name.endswith("router.scale")]
    assert len(scales) == 3 and all(gradient.any() for gradient in torch.autograd.grad(loss, scales))
    assert model.layers[0].cost(7).router == ((1 + 1) * 2.0,) * 2  # the depth's scale, and half of the experts' two
