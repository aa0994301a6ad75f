"""A modality of one's own, of vectors: registered by a module, named in a recipe, trained by the command, beside
text."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import zoo
from pretrain import metrics
from pretrain import recipe as recipes
from pretrain.data import Data, micro_batches, open_data
from pretrain.process_group import Ranks
from tests.pretrain.data import samples
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import one_rendezvous, steady
from tests.pretrain.strokes import Strokes, document, polygon, write_documents
from tests.zoo.helpers import assert_equal
from zoo.batch import Batch
from zoo.config import ConfigError
from zoo.context import TokenContext

LENGTH, STEPS = 40, 8
LAYER = {
    "mixer": {"type": "attention", "heads": 2},
    "feedforward": {"type": "moma", "experts": {"text": 2, "strokes": 1}, "d_ff": 32, "scope": "row"},
    "dropout": 0.1,
}


def recipe(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    train = {
        "steps": STEPS,
        "global_batch": 4,
        "micro_batch": 2,
        "device": "cpu",
        "log_every": 1,
        "checkpoint_every": 4,
    }
    return {
        "name": "strokes",
        "run_dir": str(run),
        "imports": ["tests.pretrain.strokes"],
        "modalities": {"text": {"type": "bytes"}, "strokes": {"type": "pen_strokes", "most": 16}},
        "model": {"d_model": 32, "layers": [LAYER, LAYER | {"depth": {"type": "mod", "capacity": 0.5}}]},
        "objective": {"type": "autoregressive", "z_loss": 1e-4},
        "data": {"path": str(data), "train": "train*.tar", "validation": "val*.tar", "sequence_length": LENGTH},
        "optimizer": {"lr": 1e-2},
        "schedule": {"type": "wsd", "decay_steps": 1},
        "train": train | changes.pop("train", {}),
        "evaluate": {"rows": 8},
        "deepspeed": {"zero_optimization": {"stage": changes.pop("stage", 2)}},
    } | changes


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_documents(tmp_path_factory.mktemp("drawings"))


@pytest.fixture(scope="module")
def data(documents: Path) -> Data:
    resolved = recipes.resolve(recipe(documents, Path("run")))
    return open_data(resolved.data, resolved.modalities, 0, log=lambda line: None)


# ---------------------------------------------------------------------------------------------------------------- data


def test_the_stream_holds_every_point_in_its_place(data: Data) -> None:
    words, stream = data.vocabulary, data.train
    place = words.range("strokes")[0]
    for number in range(stream.rows_per_epoch):
        row = stream.row(number)
        taken = iter(row.content["strokes"])
        for piece in range(int(row.document.max()) + 1):
            tokens = row.tokens[row.document == piece]
            text = data.modalities["text"].decode(tokens[(tokens >= words.range("text")[0]) & (tokens < place)] - 4)
            points = np.array([next(taken) for _ in range(int((tokens == place).sum()))])
            if text == "no drawing, only words":
                assert not len(points)
                continue
            corners = int(text.split()[0])
            assert tokens[-2 - len(points) - 1 : -1].tolist() == [
                words.begin("strokes"),
                *[place] * len(points),
                words.end("strokes"),
            ]
            assert len(points) == corners + 1
            shift = round(float(np.arctan2(points[1][1], points[1][0])) / 0.01)
            assert np.array_equal(points, np.array(polygon(corners, shift), np.float32))
        assert next(taken, None) is None


def test_rows_do_not_depend_on_ranks_or_where_one_begins(data: Data) -> None:
    def step(first: int, rows: int, micro: int, world: int) -> torch.Tensor:
        return torch.cat(
            [
                batch.content["strokes"]
                for rank in range(world)
                for batch in micro_batches(data.train, range(first, first + rows), micro, Ranks(rank, world))
            ]
        )

    whole = step(0, 12, 12, 1)
    assert whole.dtype == torch.float32 and whole.shape[1] == 3 and len(whole) > 20
    assert torch.equal(step(0, 12, 2, 3), whole)
    assert torch.equal(torch.cat([step(0, 5, 1, 1), step(5, 7, 1, 1)]), whole), "resuming in the middle"


def test_content_that_is_no_drawing_is_named(tmp_path: Path) -> None:
    from tests.pretrain.data.samples import write_shard

    write_shard(
        tmp_path / "train.tar",
        [
            document("fine", "3 corners", polygon(3, 0)),
            document("empty", "", []),
            document("long", "", polygon(40, 0)),
            document("words", "", "no list"),  # type: ignore[arg-type]
            document("endless", "", [[0.0, float("inf"), 1.0]]),
        ],
    )
    changed = recipe(tmp_path, tmp_path / "run")
    changed["data"] |= {"validation": None, "max_broken_documents": 4}
    resolved = recipes.resolve(changed)
    opened = open_data(resolved.data, resolved.modalities, 0, log=lambda line: None)
    assert len(samples.documents(opened)) == 1
    reasons = {skipped.key: skipped.reason for skipped in opened.skipped}
    assert reasons["empty"] == "its drawing takes 0 positions, modalities.strokes allows 1 to 16"
    assert reasons["long"] == "its drawing takes 41 positions, modalities.strokes allows 1 to 16"
    assert reasons["words"].startswith("pen does not decode (")
    assert reasons["endless"] == "its drawing holds numbers that are not finite"


def test_the_best_constant_guess(data: Data) -> None:
    points = np.concatenate([data.train.row(n).content["strokes"] for n in range(data.train.rows_per_epoch)])
    expected = points.astype(np.float64).var(0).mean()
    assert data.constant_error("train") == {"strokes": pytest.approx(expected, rel=1e-12)}


# --------------------------------------------------------------------------------------------------------------- recipe


def test_the_model_follows_from_the_section(documents: Path) -> None:
    resolved = recipes.resolve(recipe(documents, Path("run")))
    assert resolved.model.modalities == ["text", "strokes"] and resolved.model.vocab_size == 4 + 256 + 1
    assert resolved.model.own_stems["strokes"].model_dump() == {"type": "vectors", "width": 3}
    assert resolved.model.own_heads["strokes"].model_dump() == {"type": "vectors", "width": 3, "open_ended": True}
    assert recipes.resolve(resolved.dump()) == resolved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modalities": {"text": {"type": "bytes"}, "strokes": {"type": "pen_stroke"}}}, "did you mean 'pen_strokes'"),
        (
            {"imports": [], "modalities": {"text": {"type": "bytes"}, "drawings": {"type": "pen_strokes", "most": 0}}},
            "most: 0",
        ),
        (
            {"data": {"path": "x", "sequence_length": 19}},
            r"data.sequence_length: 19: is too short for one strokes: 16 positions, .* at least 20$",
        ),
    ],
)
def test_errors(documents: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipes.resolve(recipe(documents, Path("run")) | change)


def test_a_stem_that_does_not_fit(documents: Path) -> None:
    wrong = recipe(documents, Path("run"))
    wrong["model"] |= {"stem": {"strokes": {"type": "vectors", "width": 4}}}
    message = (
        r"^model.stem.strokes: is for Vectors\(width=4\), but a position of modalities.strokes carries"
        r" Vectors\(width=3\)"
    )
    with pytest.raises(ConfigError, match=message):
        recipes.resolve(wrong)


def test_it_is_written_to_a_file_that_can_be_opened() -> None:
    strokes = Strokes(Strokes.Config())
    item = np.array(polygon(3, 1), np.float32)
    assert np.array_equal(strokes.decode(strokes.encode(item)), item)
    assert strokes.write(item).startswith(b"<svg") and strokes.write(item).count(b" l") == 3


# ---------------------------------------------------------------------------------------------------------------- model


def test_packed_is_separate(data: Data) -> None:
    """Every piece alone gives what it gives in its row, in causal routing."""
    resolved = recipes.resolve(recipe(Path("x"), Path("run")))
    model: Any = zoo.build("model", resolved.model, seed=1).double().eval()
    (packed,) = micro_batches(data.train, range(4), 4)
    packed = Batch(packed.tokens, packed.context.replace(routing="causal"), _double(packed.content))
    places = packed.context.index(1)
    logits, heads = model(packed.tokens, packed.context, content=packed.content, read={"strokes": places})
    for row, start, length in packed.context.document_spans:
        inside = ((places // LENGTH) == row) & (places % LENGTH >= start) & (places % LENGTH < start + length)
        columns = slice(start, start + length)
        context = TokenContext.from_modality(
            packed.context.modality[row : row + 1, columns], modalities=("text", "strokes"), routing="causal"
        )
        content = {"strokes": packed.content["strokes"][inside]}
        alone, head = model(
            packed.tokens[row : row + 1, columns], context, content=content, read={"strokes": context.index(1)}
        )
        torch.testing.assert_close(alone[0], logits[row, columns], rtol=0, atol=1e-10)
        torch.testing.assert_close(head["strokes"], heads["strokes"][inside], rtol=0, atol=1e-10)


def _double(content: Any) -> dict[str, torch.Tensor]:
    return {name: values.double() for name, values in content.items()}


# ------------------------------------------------------------------------------------------------------------- training


def train(folder: Path, name: str, recipe: dict[str, Any]) -> None:
    import pretrain.train

    path = folder / f"{name}-{os.environ['RANK']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert pretrain.train.main([str(path)]) == 0, name


def trained_alone(folder: Path, documents: Path) -> None:
    """One rank: the whole run, and one that stops in the middle and goes on."""
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        train(folder, "whole", recipe(documents, folder / "whole"))
        train(folder, "half", recipe(documents, folder / "resumed", train={"steps": STEPS // 2}))
        train(folder, "resumed", recipe(documents, folder / "resumed"))


def trained_by_two(folder: Path, documents: Path) -> None:
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for stage in (2, 3):
            train(
                folder,
                f"two-{stage}",
                recipe(documents, folder / f"two-{stage}", stage=stage, train={"micro_batch": 1}),
            )


@pytest.fixture(scope="module")
def runs(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strokes")
    for world, target in ((1, "trained_alone"), (2, "trained_by_two")):
        run_ranks(
            f"tests.pretrain.test_own_modality:{target}",
            world,
            folder / target,
            280,
            folder=folder,
            documents=documents,
        )
    return folder


def test_it_learns(runs: Path) -> None:
    items = metrics.read(runs / "whole" / "metrics.jsonl")
    steps = [item for item in items if "loss" in item]
    for name in ("loss", "loss/text", "loss/strokes", "loss/strokes_length"):
        assert steps[-1][name] < steps[0][name], name
    assert steps[0]["loss/strokes"] < 2, "a mean of squares, not nats"
    last = items[-1]
    assert {f"eval/causal/loss{part}" for part in ("", "/text", "/strokes", "/strokes_length")} <= last.keys()
    assert "eval/unigram/text" in last and "eval/unigram/strokes" not in last
    assert last["eval/causal/loss/strokes"] < last["eval/constant/strokes"]
    weights = load_file(runs / "whole" / "model.safetensors")
    assert weights["stems.strokes.weight"].shape == (32, 3) and weights["heads.strokes.weight"].shape == (3, 32)


def test_resumed_is_uninterrupted(runs: Path) -> None:
    whole, resumed = ([i for i in steady(runs / name) if "loss" in i] for name in ("whole", "resumed"))
    assert whole == resumed
    ours, theirs = (load_file(runs / name / "model.safetensors") for name in ("resumed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_which_one_may_have_none(runs: Path, data: Data, stage: int) -> None:
    held = [
        [
            len(batch.content["strokes"])
            for batch in micro_batches(data.train, range(4 * step, 4 * step + 4), 1, Ranks(rank, 2), step=step)
        ]
        for step in range(STEPS)
        for rank in range(2)
    ]
    assert any(not sum(counts) for counts in held), "in some step a rank has no drawing at all"
    one, two = ([i for i in steady(runs / name) if "loss" in i] for name in ("whole", f"two-{stage}"))
    for mine, other in zip(two, one, strict=True):
        for name in ("loss", "loss/text", "loss/strokes", "loss/strokes_length", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), (mine["step"], name)
    ours, theirs = (load_file(runs / name / "model.safetensors") for name in (f"two-{stage}", "whole"))
    assert_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())), tolerance=2e-2)
