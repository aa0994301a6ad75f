"""`python -m tools.evaluate`: equal to what the run said itself, on any format of data, and its errors."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import zoo
from pretrain import metrics
from pretrain import recipe as recipes
from pretrain.recipe import Recipe
from tests.pretrain.data.samples import sample, write_shard
from tools.evaluate.__main__ import main
from tools.evaluate.data import documents, named_data, own_data
from tools.evaluate.losses import losses, plain_bytes
from tools.evaluate.retrieval import grouped, retrieve
from zoo.config import UserError
from zoo.generate import Part
from zoo.run import Run


@pytest.fixture(scope="module")
def folder(trained_run: Path) -> Path:
    return trained_run / "run"


@pytest.fixture(scope="module")
def data(trained_run: Path) -> str:
    return f"data.path={trained_run / 'moved'}"


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return zoo.load(folder)


@pytest.fixture(scope="module")
def recipe(folder: Path, data: str) -> Recipe:
    return recipes.load(folder / "recipe.yaml", [data])


def test_its_own_data_give_what_it_said_itself(folder: Path, data: str, tmp_path: Path, capsys: Any) -> None:
    assert main([str(folder), data, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "evaluation.json").read_text())
    found, own = written["data"]["validation"]["loss"], metrics.read(folder / "metrics.jsonl")[-1]
    assert found["difference"] == 0 and found["step"] == written["step"] == 1 and found["rows"] == 8
    kept = [key for key in own if key.startswith("eval/")]
    assert len(kept) > 20 and all(found["values"][key] == own[key] for key in kept)
    for name in ("", "/text", "/image"):
        gap = own[f"eval/causal/loss{name}"] - own[f"eval/topk/loss{name}"]
        assert found["values"][f"eval/gap{name}"] == gap
    assert found["values"]["eval/causal/perplexity/image"] == math.exp(own["eval/causal/loss/image"])
    printed = capsys.readouterr().out
    assert "the run's own last evaluation (step 1) says the same to within 0.0e+00" in printed
    assert f"{own['eval/causal/loss/image']:.4f}" in printed

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (scalar,) = events.Scalars("data/validation/loss/values/eval/causal/loss/image")
    assert scalar.step == 1 and scalar.value == np.float32(own["eval/causal/loss/image"])


def test_bits_a_byte_are_of_what_the_rows_hold(run: Run, recipe: Recipe) -> None:
    own = own_data(recipe)
    stream = own.stream(own.open(run, 0))
    rows = [stream.row(number) for number in range(3)]
    pictures = sum(int((row.tokens == run.vocabulary.begin("image")).sum()) for row in rows)
    found = plain_bytes(run, stream, 3)
    assert found["image"] == 64 * pictures and found["text"] == stream.text_bytes(range(3))
    values = losses(run, recipe, own, 3).values
    nats = values["eval/causal/loss/image"] * 16 * pictures
    assert values["eval/causal/bits_per_byte/image"] == pytest.approx(nats / math.log(2) / found["image"])
    assert values["eval/causal/bits_per_byte/text"] == pytest.approx(values["eval/causal/bits_per_byte"])


def test_any_format_is_read(run: Run, recipe: Recipe, trained_run: Path, tmp_path: Path) -> None:
    """The same documents as shards of ours and as captions give the same losses; a YAML file names several."""
    own = documents(run, own_data(recipe), 24, 0)
    lines, shard = [], []
    for number, document in enumerate(own):
        texts = [part.item for part in document.parts if part.modality == "text"]
        picture = run.modalities["image"].write(next(p.item for p in document.parts if p.modality == "image"))
        (tmp_path / f"{number}.png").write_bytes(picture)
        lines.append(json.dumps({"caption": texts[0], "image": f"{number}.png"}))
        shard.append(sample(f"photos-{number:08}", texts[0], picture))
    (tmp_path / "photos.jsonl").write_text("\n".join(lines))
    write_shard(tmp_path / "ours.tar", shard)
    (tmp_path / "several.yaml").write_text(
        f"all: {{type: captions, path: {tmp_path / 'photos.jsonl'}}}\n"
        f"some: {{type: captions, path: {tmp_path / 'photos.jsonl'}, validation: 0.4}}\n"
    )
    words = [str(tmp_path / "ours.tar"), f"captions:{tmp_path / 'photos.jsonl'}", str(tmp_path / "several.yaml")]
    named = named_data(words, recipe)
    assert [each.name for each in named] == ["ours", "photos", "all", "some"]
    ours, photos, every, some = (losses(run, recipe, each, 1000) for each in named)
    assert ours.values["eval/causal/loss"] == pytest.approx(photos.values["eval/causal/loss"], rel=1e-6)
    assert every.values == photos.values and 0 < some.rows_of < every.rows_of and ours.step is None
    assert {len(documents(run, each, 1000, 0)) for each in named[:3]} == {24}
    assert 0 < len(documents(run, named[3], 1000, 0)) < 24


def test_groups_hold_no_text_twice() -> None:
    texts = [str(n % 5) for n in range(23)] + ["a", "b"]
    groups = grouped(texts, 4)
    assert all(len({texts[n] for n in group}) == 4 for group in groups) and len(groups) >= 5
    assert sorted(n for group in groups for n in group) == sorted({n for group in groups for n in group})
    assert [len(group) for group in grouped(["x", "y", "x"], 9)] == [2] and grouped(["x", "x"], 9) == []


def test_retrieval_is_what_likelihoods_say(run: Run, recipe: Recipe) -> None:
    found = retrieve(run, own_data(recipe), "image", 30, 4, 0)
    named = [({part.modality: part.item for part in each.parts}) for each in documents(run, own_data(recipe), 30, 0)]
    groups = grouped([each["text"] for each in named], 4)
    hits, seen, nats = [], [], []
    for group in groups:
        table = np.array(
            [
                [run.log_likelihoods([([Part("image", named[i]["image"])], named[t]["text"])])[0] for t in group]
                for i in group
            ]
        )
        alone = run.log_likelihoods([([], named[t]["text"]) for t in group])
        hits += list((table - alone).argmax(1) == np.arange(4))
        seen += list(table.argmax(0) == np.arange(4))
        nats += list(np.diag(table))
    assert found.documents == 4 * len(groups) and found.candidates == 4
    assert found.item_to_text.value == np.mean(hits) and found.text_to_item.value == np.mean(seen)
    assert found.caption_nats == pytest.approx(-np.mean(nats), rel=1e-5)
    assert found.text_to_item_by_item is not None and 0 <= found.text_to_item_by_item.low <= 1


def test_generation_is_judged(folder: Path, data: str, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "brightness.py").write_text(
        "import numpy as np\ndef of(items):\n    return np.stack([[i.mean(), i.std(), i[:4].mean()] for i in items])\n"
    )
    monkeypatch.chdir(tmp_path)
    command = [str(folder), data, "--measure", "retrieval", "generation", "--documents", "24", "--candidates", "5"]
    assert main([*command, "--features", "brightness:of", "--out", str(tmp_path / "out"), "--temperature", "0.9"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())["data"]["validation"]
    made = found["generation"]["image"]
    assert made["items"] == 24 and made["labels"] == 10 and made["classifier_on_held_out"] > 0.6
    assert made["nearest_training"] > made["nearest_training_of_held_out"] > 0, "an untrained run draws nothing"
    assert made["frechet"] > 3 * made["frechet_of_training"] and made["kernel"] > 0
    assert found["retrieval"]["image"]["candidates"] == 5
    assert (tmp_path / "out" / "validation-image.html").read_text().count("data:image/png") == 24
    assert "seen as asked, of 10 labels" in capsys.readouterr().out


def test_mistakes_are_one_line(folder: Path, data: str, trained_run: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    write_shard(
        tmp_path / "spoken.tar",
        [
            sample(
                "0",
                "a",
                json=json.dumps(
                    {"parts": [{"type": "text", "text": "a"}, {"type": "audio", "file": "0.wav"}]}
                ).encode(),
                **{"0.wav": b"x"},
            )
        ],
    )
    write_shard(tmp_path / "texts.tar", [sample(str(n), "a text alone") for n in range(3)])
    held_out = str(trained_run / "moved" / "*val*.tar")
    cases: list[tuple[list[object], str]] = [
        ([], "is not a folder"),
        ([tmp_path / "none"], "leads to no file"),
        ([tmp_path / "list.yaml"], "list.yaml: is no mapping of names to sources"),
        ([tmp_path / "spoken.tar"], "it has audio, for which the recipe has no modality"),
        ([tmp_path / "spoken.tar", "--measure", "retrieval"], "it has audio, of which"),
        ([tmp_path / "texts.tar", "--measure", "retrieval"], "none of 200 documents is one text and one image"),
        ([held_out, "--measure", "retrieval", "--modality", "audio"], "has no such modality beside text; it has image"),
        ([held_out, "--measure", "generation"], "is not a folder"),
        ([data, "--measure", "generation", "--features", "nothing"], "--features nothing: is neither a folder"),
        ([data, "--measure", "generation", "--labels", tmp_path / "no.json", "--documents", "5"], "no.json"),
        ([data, "--rows", "0"], "--rows 0: is too few"),
        ([data, "train.stepz=1"], "train.stepz"),
    ]
    for words, reason in cases:
        assert main([str(folder), "--out", str(tmp_path / "out"), *map(str, words)]) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and reason in error, (words, error)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_run_folder_runs_no_command(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Not that of its own recipe; whoever evaluates it may name one."""
    pipe = f"pipe:touch {tmp_path / 'ran'}"
    shutil.copytree(folder, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["data"] |= {"path": None, "sources": {"x": {"type": "documents", "path": pipe, "validation": 0.5}}}
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main([str(tmp_path / "run")]) == 2 and not (tmp_path / "ran").exists()
    assert "stands in the recipe of a run folder, which runs no commands" in capsys.readouterr().err
    assert main([str(tmp_path / "run"), f"data.sources.x.path={pipe}"]) == 2 and (tmp_path / "ran").exists()


def test_what_has_no_auxiliary_routers_is_evaluated_as_trained(run: Run, recipe: Recipe) -> None:
    """Its losses are those of top-k routing; what goes token by token is refused."""
    model = recipe.model.model_dump(mode="json")
    for layer in model["layers"]:
        layer["feedforward"]["auxiliary"] = False
        if layer["depth"] is not None:
            layer["depth"]["auxiliary"] = False
    blind = dataclasses.replace(run, model=zoo.build("model", model, seed=1).eval())
    values = losses(blind, recipe, own_data(recipe), 2).values
    assert "eval/topk/loss/image" in values and not any("causal" in key or "gap" in key for key in values)
    with pytest.raises(UserError, match="have no auxiliary router; train them: python -m tools.train_routers"):
        retrieve(blind, own_data(recipe), "image", 20, 4, 0)
