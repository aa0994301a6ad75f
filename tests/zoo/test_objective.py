"""The autoregressive objective by hand."""

from __future__ import annotations

import pytest
import torch

import zoo
from tests.zoo.helpers import VOCABULARY, Batch, build_model, ids, layer, stream
from zoo import ConfigError


class Fixed(torch.nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(*shape, VOCABULARY, dtype=torch.float64))

    def forward(self, tokens: torch.Tensor, context: zoo.TokenContext) -> torch.Tensor:
        return self.logits


def objective(**config):
    return zoo.build("objective", {"type": "autoregressive", **config})


ROWS = ("ttiit|itti", "tti|t", "..it|t|ii", ".")
TARGETS = {  # of each row: (column of the predicted token, its modality)
    "text": [(0, 1), (0, 4), (0, 6), (0, 7), (1, 1), (2, 3)],
    "image": [(0, 2), (0, 3), (0, 8), (1, 2), (2, 6)],
}


def test_a_loss_is_the_cross_entropy_of_the_next_token_of_the_same_document():
    context = stream(*ROWS)
    model, tokens = Fixed(context.shape), ids(context)
    log_p = model.logits.log_softmax(-1)
    parts = objective(z_loss=1.0)(model, Batch(tokens, context))
    for name, places in TARGETS.items():
        total, count = parts[name]
        assert int(count) == len(places)
        torch.testing.assert_close(total, -sum(log_p[b, t - 1, tokens[b, t]] for b, t in places))
    every = [place for places in TARGETS.values() for place in places]
    total, count = parts["z_loss"]
    assert int(count) == len(every)
    torch.testing.assert_close(total, sum(model.logits[b, t - 1].exp().sum().log() ** 2 for b, t in every))


def test_no_gradient_reaches_what_predicts_nothing():
    context = stream(*ROWS)
    model = Fixed(context.shape)
    parts = objective(z_loss=1.0)(model, Batch(ids(context), context))
    (gradient,) = torch.autograd.grad(sum(total for total, _ in parts.values()), model.logits)
    reached = gradient.any(-1).nonzero().tolist()
    assert reached == sorted([b, t - 1] for places in TARGETS.values() for b, t in places)


@pytest.mark.parametrize(
    "rows", [ROWS, ("tttt",), ("....", "i|i|."), ("t", "i")], ids=["both", "text", "none", "short"]
)
def test_counts_are_those_of_the_forward(rows):
    context = stream(*rows)
    parts = objective()(Fixed(context.shape), Batch(ids(context), context))
    assert objective().counts(context) == {name: int(count) for name, (_, count) in parts.items()}


def test_a_modality_absent_counts_zero_and_is_joined_to_the_graph():
    context = stream("tttt", "tt|tt")
    model = Fixed(context.shape)
    total, count = objective()(model, Batch(ids(context), context))["image"]
    (gradient,) = torch.autograd.grad(total, model.logits)
    assert not total.detach().any() and int(count) == 0 and not gradient.any()


def test_combine_is_the_weighted_mean_over_the_step_and_linear_in_the_sums():
    combine = objective(weights={"image": 0.5}, z_loss=0.1).combine
    counts = {"text": 6, "image": 4}
    sums = {"text": torch.tensor(12.0), "image": torch.tensor(20.0), "z_loss": torch.tensor(30.0)}
    assert float(combine(sums, counts)) == pytest.approx((12 + 0.5 * 20) / (6 + 0.5 * 4) + 0.1 * 30 / 10)
    part = {name: value * 0.3 for name, value in sums.items()}
    rest = {name: value * 0.7 for name, value in sums.items()}
    assert float(combine(part, counts) + combine(rest, counts)) == pytest.approx(float(combine(sums, counts)))
    assert float(combine({name: value * 0 for name, value in sums.items()}, {"text": 0, "image": 0})) == 0
    only = objective(weights={"text": 0.0}).combine
    assert float(only(sums, counts)) == pytest.approx(20 / 4)


def test_every_parameter_of_a_model_gets_a_gradient_without_a_modality():
    model, context = build_model(layer()), stream("tttt")
    parts = objective()(model, Batch(ids(context), context))
    total = sum(total for total, _ in parts.values())
    grads = torch.autograd.grad(total, [p for name, p in model.named_parameters() if "auxiliary" not in name])
    assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"weights": {"imag": 1.0}},
            "objective.weights.imag: unknown modality; model.modalities are text, image (did you mean 'image'?)",
        ),
        ({"weights": {"image": -1.0}}, "objective.weights.image: -1.0 is negative; a weight is 0 or more"),
        ({"z_loss": -0.1}, "objective.z_loss: -0.1: must be greater than or equal to 0"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ConfigError) as error:
        objective(**config)
    assert str(error.value) == message
