"""The autoregressive objective by hand."""

from __future__ import annotations

import pytest
import torch

import zoo
from tests.zoo.helpers import VOCABULARY, build_model, ids, layer, stream
from zoo import ConfigError
from zoo.batch import Batch
from zoo.cross_entropy import of_logits


class Fixed(torch.nn.Module):
    """A model whose logits are its only parameter, under objectives without heads of modalities."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(*shape, VOCABULARY, dtype=torch.float64))

    def forward(self, tokens, context, *, target, log_z, **rest):
        return of_logits(self.logits, target, log_z), {}


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
    batch = Batch(tokens, context)
    parts, counts = objective(z_loss=1.0)(model, batch), objective(z_loss=1.0).counts(batch)
    for name, places in TARGETS.items():
        assert counts[name] == len(places)
        torch.testing.assert_close(parts[name], -sum(log_p[b, t - 1, tokens[b, t]] for b, t in places))
    every = [place for places in TARGETS.values() for place in places]
    assert counts["z_loss"] == len(every)
    torch.testing.assert_close(parts["z_loss"], sum(model.logits[b, t - 1].exp().sum().log() ** 2 for b, t in every))


def test_no_gradient_reaches_what_predicts_nothing():
    context = stream(*ROWS)
    model = Fixed(context.shape)
    parts = objective(z_loss=1.0)(model, Batch(ids(context), context))
    (gradient,) = torch.autograd.grad(sum(parts.values()), model.logits)
    reached = gradient.any(-1).nonzero().tolist()
    assert reached == sorted([b, t - 1] for places in TARGETS.values() for b, t in places)


def test_a_modality_absent_counts_zero_and_is_joined_to_the_graph():
    context = stream("tttt", "tt|tt")
    model = Fixed(context.shape)
    batch = Batch(ids(context), context)
    total = objective()(model, batch)["image"]
    (gradient,) = torch.autograd.grad(total, model.logits)
    assert not total.detach().any() and objective().counts(batch)["image"] == 0 and not gradient.any()


def test_combine_is_the_weighted_mean_over_the_step_and_linear_in_the_sums():
    combine = objective(weights={"image": 0.5}, z_loss=0.1).combine
    counts = {"text": 6, "image": 4, "z_loss": 10}
    sums = {"text": torch.tensor(12.0), "image": torch.tensor(20.0), "z_loss": torch.tensor(30.0)}
    assert float(combine(sums, counts)) == pytest.approx((12 + 0.5 * 20) / (6 + 0.5 * 4) + 0.1 * 30 / 10)
    part = {name: value * 0.3 for name, value in sums.items()}
    rest = {name: value * 0.7 for name, value in sums.items()}
    assert float(combine(part, counts) + combine(rest, counts)) == pytest.approx(float(combine(sums, counts)))
    assert float(combine({name: value * 0 for name, value in sums.items()}, dict.fromkeys(sums, 0))) == 0
    only = objective(weights={"text": 0.0}).combine
    assert float(only(sums, counts)) == pytest.approx(20 / 4)


def test_the_z_loss_is_reported_in_training_alone():
    sums, counts = {"text": 12.0, "image": 0.0, "z_loss": 30.0}, {"text": 6, "image": 0, "z_loss": 6}
    assert objective(z_loss=0.1).report(sums, counts, training=True) == {"text": 2.0, "z": 5.0}
    assert objective(z_loss=0.1).report(sums, counts, training=False) == {"text": 2.0}


def test_every_parameter_of_a_model_gets_a_gradient_without_a_modality():
    model, context = build_model(layer()), stream("tttt")
    parts = objective()(model, Batch(ids(context), context))
    grads = torch.autograd.grad(
        sum(parts.values()), [p for name, p in model.named_parameters() if "auxiliary" not in name]
    )
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
