"""Losses of single documents: they add up to what the evaluation reports, whoever computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain import recipe as recipes
from pretrain.data import Mixture, micro_batches, open_data
from pretrain.describe import blueprint, objective_of
from pretrain.document_losses import DocumentLosses, path_of
from pretrain.evaluate import evaluate
from pretrain.process_group import Ranks
from tests.pretrain.runs import ROOT, tiny_recipe
from zoo.build import build
from zoo.config import ConfigError

ROWS = 11


@pytest.fixture(scope="module")
def tiny(digit_shards: Path) -> recipes.Recipe:
    return recipes.resolve(tiny_recipe(digit_shards, "run"))


def stream_of(recipe: recipes.Recipe) -> Mixture:
    found = open_data(recipe.data, recipe.modalities, seed=0, log=lambda line: None).validation
    assert found is not None
    return found


def kept(recipe: recipes.Recipe, stream: Mixture, path: Path, micro_batch: int = 4, **options: Any) -> Any:
    """The reported values, and what was kept of each document."""
    model: Any = build("model", recipe.model, kernels=recipe.kernels, seed=3).eval()
    values = evaluate(
        model, blueprint(recipe), objective_of(recipe), stream, ROWS, micro_batch, by_document=path, **options
    )
    return values, DocumentLosses.load(path)


def test_they_add_up(tiny: recipes.Recipe, tmp_path: Path) -> None:
    stream = stream_of(tiny)
    values, losses = kept(tiny, stream, path_of(tmp_path, 7))
    assert (tmp_path / "documents" / "step-7.npz").exists() and losses.parts == ("text", "image", "z_loss")
    sums, counts = (dict(zip(losses.parts, each.sum(0), strict=True)) for each in (losses.sums, losses.counts))
    for name in ("text", "image"):
        assert sums[name] / counts[name] == pytest.approx(values[f"eval/causal/loss/{name}"], rel=1e-6)
    combined = objective_of(tiny).combine({k: torch.tensor(v) for k, v in sums.items()}, counts)
    assert float(combined) == pytest.approx(values["eval/causal/loss"], rel=1e-6)


def test_each_is_its_documents(tiny: recipes.Recipe, tmp_path: Path) -> None:
    """The number of targets is that of the document's tokens, all its pieces together."""
    stream = stream_of(tiny)
    _, losses = kept(tiny, stream, path_of(tmp_path, 1))
    (source,) = stream.streams.values()
    wanted: dict[int, int] = {}
    for row in range(ROWS):
        pieces, found = stream.row(row), stream.documents_of_row(row)
        for order, number in enumerate(found):
            wanted[int(number)] = wanted.get(int(number), 0) + int((pieces.document == order).sum()) - 1
            text = pieces.tokens[pieces.document == order]
            assert text.tolist() == source.documents.document(int(number))[: len(text)].tolist()
    assert losses.documents.tolist() == sorted(wanted)
    assert losses.counts[:, :2].sum(1).tolist() == [wanted[number] for number in sorted(wanted)]


def test_batches_and_ranks_change_nothing(tiny: recipes.Recipe, tmp_path: Path) -> None:
    stream, taken = stream_of(tiny), []

    class Half(Ranks):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 3:
                taken.append(tensor)
            return tensor

    _, whole = kept(tiny, stream, tmp_path / "whole" / "a")
    _, single = kept(tiny, stream, tmp_path / "single" / "a", micro_batch=1)
    np.testing.assert_allclose(single.sums, whole.sums, rtol=1e-5, atol=1e-5)
    for rank in range(2):
        model: Any = build("model", tiny.model, kernels=tiny.kernels, seed=3).eval()
        path = tmp_path / f"{rank}" / "a"
        evaluate(model, model, objective_of(tiny), stream, ROWS, 2, by_document=path, ranks=Half(rank, 2))
        assert path.exists() == (rank == 0), "the first rank writes"
    np.testing.assert_allclose((taken[0] + taken[1])[0].numpy(), whole.sums, rtol=1e-5, atol=1e-5)


def test_several_sources(digit_shards: Path) -> None:
    """Documents of the second source are numbered after those of the first."""
    recipe = recipes.load(ROOT / "recipes/tiny/mixture.yaml", [f"data.path={digit_shards}"])
    train = open_data(recipe.data, recipe.modalities, seed=0, log=lambda line: None).train
    first, second = train.streams.values()
    for row in range(12):
        stream, inside = train.place(row)
        before = 0 if stream is first else len(first.documents)
        assert train.documents_of_row(row).tolist() == (stream.documents_of_row(inside) + before).tolist()
    assert any(train.place(row)[0] is second for row in range(12))


def test_denoised_items(digit_shards: Path, tmp_path: Path) -> None:
    """An item's loss is its document's; the parts by classes of times are nobody's."""
    recipe = recipes.load(ROOT / "recipes/tiny/transfusion.yaml", [f"data.path={digit_shards}"])
    values, losses = kept(recipe, stream_of(recipe), path_of(tmp_path, 1))
    assert "image" in losses.parts and not any("@" in part for part in losses.parts)
    column = losses.parts.index("image")
    mean = losses.sums[:, column].sum() / losses.counts[:, column].sum()
    assert mean == pytest.approx(values["eval/causal/loss/image"], rel=1e-5)


def test_an_objective_that_does_not_tell(tiny: recipes.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.objective.block, "tells_terms", False)
    with pytest.raises(ConfigError, match="evaluate.documents: true, but the objective 'autoregressive' does not tell"):
        recipes.resolve({**tiny.dump(), "evaluate": {"documents": True}})


def test_training_batches_keep_no_terms(tiny: recipes.Recipe) -> None:
    from zoo.trace import Trace

    stream, trace = stream_of(tiny), Trace()
    (batch,) = micro_batches(stream, range(2), 2)
    model: Any = build("model", tiny.model, kernels=tiny.kernels, seed=3)
    objective_of(tiny)(model, batch.under(trace=trace))
    assert trace.terms is None
