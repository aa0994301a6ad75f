"""Down and up blocks as stem and head: shapes, what sees what, costs, and images that are not there."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import zoo
from tests.zoo.helpers import ATTENTION, D_MODEL, DENSE, ids, stream
from zoo import ConfigError
from zoo.batch import Batch

KEYS = {"width": 12, "grid": 2, "planes": 3, "channels": 4, "blocks": 1}
DOWN, UP = {"type": "unet_down"} | KEYS, {"type": "unet_up"} | KEYS


def config(**changes):
    model = {"modalities": ["text", "image"], "d_model": D_MODEL, "vocab_size": 29}
    ends = {"stem": {"image": DOWN | changes}, "head": {"image": UP | changes}}
    return model | ends | {"layers": [{"mixer": ATTENTION, "feedforward": DENSE}]}


def batch(*rows: str) -> Batch:
    context = stream(*(rows or ("tt[iiii]t|t[iiii]tt", "ttt|tt[iiii]t...")))
    vectors = torch.randn(context.totals[1], 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Batch(ids(context), context, {"image": vectors})


def test_positions_and_pictures_are_one_another_turned_round():
    geometry = zoo.ModelConfig.parse(config()).own_stems["image"]
    vectors = torch.arange(2 * 4 * 12).view(8, 12)
    picture = geometry.picture(vectors)
    assert picture.shape == (2, 3, 4, 4) and torch.equal(geometry.vectors(picture), vectors)
    # position 1 is the upper right; its numbers are rows of its patch, the planes of a place together
    assert picture[0, :, 0, 2].tolist() == vectors[1, :3].tolist()
    assert picture[0, :, 1, 3].tolist() == vectors[1, 9:].tolist()


@pytest.mark.parametrize("kind", ["transfusion", "flow"])
def test_it_is_trained_and_every_weight_counts(kind):
    model, given = zoo.build("model", config()).double(), batch()
    heads = zoo.ModelConfig.parse(config()).own_heads
    objective = zoo.build("objective", {"type": kind}, heads=heads, bidirectional=("image",))
    loss = objective.combine(objective(model, given), objective.counts(given))
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(bool(gradient.any()) for gradient in gradients)


def test_an_image_is_seen_by_no_other():
    """By stem and head alone."""
    model, given = zoo.build("model", config()).double(), batch()
    stem, head = model.stems["image"], model.heads["image"]
    x = given.content["image"]
    other = x.clone()
    other[5] += 1
    moved = (stem(x) - stem(other)).abs().amax(1) > 0
    assert moved.tolist() == [False] * 4 + [True] * 4 + [False] * 4, "3 × 3 places reach every position of its own"
    hidden = torch.randn(12, D_MODEL, dtype=torch.float64)
    changed = hidden.clone()
    changed[5] += 1
    assert ((head(hidden) - head(changed)).abs().amax(1) > 0).tolist() == [False] * 4 + [True] * 4 + [False] * 4
    time = torch.tensor([0.1] * 4 + [0.5] * 8, dtype=torch.float64)
    later = torch.where(torch.arange(12) < 8, time, 0.9)
    assert ((stem(x, time) - stem(x, later)).abs().amax(1) > 0).tolist() == [False] * 8 + [True] * 4
    assert torch.equal(stem(x), stem(x, 0 * time))


def test_without_images_every_parameter_runs():
    model, empty = zoo.build("model", config()).double(), batch("tttt")
    heads = zoo.ModelConfig.parse(config()).own_heads
    objective = zoo.build("objective", {"type": "flow"}, heads=heads, bidirectional=("image",))
    sums = objective(model, empty)
    gradients = torch.autograd.grad(sum(sums.values()), list(model.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("changes", [{}, {"blocks": 2, "channels": 6}, {"width": 3}, {"width": 48}])
def test_cost_is_what_is_computed(changes):
    model = zoo.build("model", config(**changes))
    geometry = model.stems["image"].config
    for end, given in (("stems", geometry.width), ("heads", D_MODEL)):
        part = getattr(model, end)["image"]
        with FlopCounterMode(display=False) as counter:
            part(torch.randn(8, given))
        assert counter.get_total_flops() / 8 == pytest.approx(part.cost().flops[0]), end
        assert part.cost().active[0] == sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"planes": 4}, "model.stem.image.planes: 4; width 12 must be planes times the square of 1, 2, 4, 8, …"),
        ({"width": 27}, "model.stem.image.planes: 3; width 27 must be planes times"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ConfigError) as error:
        zoo.build("model", config(**changes))
    assert str(error.value).startswith(message)


def test_a_part_of_an_image_is_refused():
    model, given = zoo.build("model", config()).double(), batch("tt[iii]t")
    with pytest.raises(ValueError, match="^content: 3 positions are no whole images of 2 × 2"):
        model(given.tokens, given.context, content=given.content)
