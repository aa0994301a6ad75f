"""Evaluation: which routings a model is judged under, what is reported, and that the split does not matter."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset

import zoo
from pretrain import recipe as recipes
from pretrain.data import Data, micro_batches, open_data
from pretrain.evaluate import evaluate, routings, validation_loss
from pretrain.process_group import Ranks
from tests.pretrain.runs import EXPERTS, LAYER, tiny_recipe
from zoo.auxiliary import AuxiliaryRouter

ROW = EXPERTS | {"scope": "row"}
MOD = {"type": "mod", "capacity": 0.5, "scope": "row"}
DENSE = {"type": "dense", "d_ff": 32}
MODELS = {
    "dense": [LAYER | {"feedforward": DENSE}],
    "moma": [LAYER | {"feedforward": ROW}],
    "both": [LAYER | {"feedforward": ROW}, LAYER | {"feedforward": ROW, "depth": MOD}],
    "no auxiliary": [LAYER | {"feedforward": ROW | {"auxiliary": False}}],
}
ROWS = 11


@pytest.fixture(scope="module")
def data(digit_shards: Path) -> Data:
    recipe = recipes.resolve(tiny_recipe(digit_shards, "run"))
    return open_data(recipe.data, recipe.modalities, seed=0, log=lambda line: None)


def model_of(name: str) -> Any:
    config = {"modalities": ["text", "image"], "d_model": 32, "layers": MODELS[name], "vocab_size": 276}
    return zoo.build("model", config, seed=1).eval()


def values_of(model: Any, data: Data, micro_batch: int, **options: Any) -> dict[str, float]:
    objective = zoo.build("objective", {"type": "autoregressive", "z_loss": 1e-3}, d_model=32)
    assert data.validation is not None
    return evaluate(model, model, objective, data.validation, ROWS, micro_batch, **options)


LOSSES = {"loss", "loss/text", "loss/image"}
RATES = ("accuracy", "precision", "recall", "always_skip")
FLOPS = {"eval/causal/flops_per_token", "eval/nominal_flops_per_token"}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_reported(data: Data, name: str) -> None:
    expected = {
        "dense": ("causal",),
        "moma": ("topk", "causal"),
        "both": ("topk", "causal"),
        "no auxiliary": ("topk",),
    }[name]
    model = model_of(name)
    assert routings(model) == expected
    values = values_of(model, data, 4)
    keys = {f"eval/{routing}/{loss}" for routing in expected for loss in LOSSES}
    if len(expected) == 2:
        routers = [f"{name}/" for m in model.modules() if isinstance(m, AuxiliaryRouter) for name in m.names]
        keys |= FLOPS | {f"eval/auxiliary/{router}{rate}" for router in ["", *routers] for rate in RATES}
    usage = {key for key in values if "/router/" in key}
    assert set(values) - usage == keys and bool(usage) == (name != "dense")
    assert validation_loss(values) == values[f"eval/{expected[-1]}/loss"]
    if len(expected) == 2:
        assert values["eval/topk/loss"] != values["eval/causal/loss"]
        assert 0 < values["eval/causal/flops_per_token"] != values["eval/nominal_flops_per_token"]
        assert 0 <= values["eval/auxiliary/accuracy"] <= 1


@pytest.mark.parametrize("name", ["dense", "both"])
def test_batches_change_nothing(data: Data, name: str) -> None:
    """Eleven rows in batches of 1, 4 (the last padded) and 16; everything but top-k and its scope is per row anyway."""
    model = model_of(name)
    whole = values_of(model, data, 16)
    for micro_batch in (1, 4):
        assert values_of(model, data, micro_batch) == pytest.approx(whole, rel=1e-6)


class Recorded(Ranks):
    """One of two ranks that run one after the other: it keeps what it would have reduced, or gets `answers` for it."""

    def __init__(self, rank: int, world: int, answers: list[torch.Tensor] | None = None) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "taken", [])
        object.__setattr__(self, "answers", answers and list(answers))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.taken.append(tensor.clone())
        return self.answers.pop(0) if self.answers else tensor


def test_ranks_change_nothing(data: Data) -> None:
    """Two ranks, one after the other, whose sums are added as the all-reduce does."""
    model = model_of("both")
    taken: list[list[torch.Tensor]] = []
    for rank in range(2):
        ranks = Recorded(rank, 2)
        values_of(model, data, 2, ranks=ranks)
        taken.append(ranks.taken)
    assert [len(tensors) for tensors in taken] == [3, 3], "every rank reduces equally often"
    both = Recorded(1, 2, [a + b for a, b in zip(*taken, strict=True)])
    assert values_of(model, data, 2, ranks=both) == pytest.approx(values_of(model, data, 11), rel=1e-6)


def test_each_modality_is_the_mean_over_its_targets(data: Data) -> None:
    """Against per-token losses collected by hand, on the causal dense model."""
    assert data.validation is not None
    model = model_of("dense")
    found: dict[int, list[float]] = {0: [], 1: []}
    for batch in micro_batches(data.validation, range(ROWS), 1):
        with torch.no_grad():
            log = model(batch.tokens, batch.context).log_softmax(-1)[0]
        document, modality = batch.context.document[0], batch.context.modality[0]
        for t in range(len(document) - 1):
            if document[t + 1] >= 0 and document[t] == document[t + 1]:
                found[int(modality[t + 1])].append(-float(log[t, batch.tokens[0, t + 1]]))
    values = values_of(model, data, 4)
    for m, name in enumerate(("text", "image")):
        assert values[f"eval/causal/loss/{name}"] == pytest.approx(sum(found[m]) / len(found[m]), rel=1e-5)


def test_losses_are_not_rounded_to_fp32(data: Data) -> None:
    import numpy as np

    loss = values_of(model_of("dense"), data, 4)["eval/causal/loss"]
    assert float(np.float32(loss)) != loss


def test_validation_loss_of_nothing() -> None:
    assert validation_loss({}) == float("inf")


def test_no_batches_count_as_many_numbers(data: Data) -> None:
    """A rank that has none, because its data broke, still takes part in the sum over all ranks."""
    from pretrain.evaluate import count_batches

    objective = zoo.build("objective", {"type": "autoregressive"}, d_model=32)
    (batch,) = micro_batches(data.train, range(2), 2)
    some, none = (count_batches(objective, ("text", "image"), batches) for batches in ([batch], []))
    assert none == some.of([0] * len(some.numbers())) and sum(some.tokens) > 0


@pytest.mark.parametrize("text", [{"type": "bytes"}, {"type": "bpe", "vocab_size": 300}], ids=["bytes", "bpe"])
def test_bits_per_byte(digit_shards: Path, text: dict[str, Any]) -> None:
    """All of the text's nats over the bytes of the documents as the shards hold them, whatever tokenises them."""
    recipe = recipes.resolve(tiny_recipe(digit_shards, "run", modalities={"text": text}))
    data = open_data(recipe.data, recipe.modalities, seed=0, log=lambda line: None)
    config = {"modalities": ["text", "image"], "d_model": 32, "layers": MODELS["dense"], "vocab_size": 400}
    model: Any = zoo.build("model", config, seed=1).eval()
    objective = zoo.build("objective", {"type": "autoregressive"}, d_model=32)
    stream = data.validation
    assert stream is not None
    values = evaluate(model, model, objective, stream, stream.rows_per_epoch, 16, bits_per_byte=True)
    total = 0
    for item in webdataset.WebDataset(str(next(digit_shards.glob("*val*.tar"))), shardshuffle=False):
        parts = json.loads(item["json"])["parts"]
        total += sum(len(part["text"].encode()) for part in parts if part["type"] == "text")
    assert stream.text_bytes(range(stream.rows_per_epoch)) == total
    terms = sum(objective.counts(batch)["text"] for batch in micro_batches(stream, range(stream.rows_per_epoch), 1))
    nats = values["eval/causal/loss/text"] * terms
    assert values["eval/causal/bits_per_byte"] == pytest.approx(nats / math.log(2) / total, rel=1e-9)
    assert "eval/causal/bits_per_byte" not in evaluate(model, model, objective, stream, 4, 4)
