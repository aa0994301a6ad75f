"""Captions and drawings both ways, for a run of vectors and one of ids; and the figures by hand."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import zoo
from tests.pretrain.data.samples import sample, write_shard
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import tiny_recipe
from tools.evaluate.judging import Share, distances, picture_rows
from tools.examples import evaluate_drawings
from tools.examples.captions import draw, scores
from tools.examples.judge_drawings import Captioned, classifier, nearest, read_captioned
from zoo.context import CAUSAL, TokenContext
from zoo.sampling import Sampling

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
PICTURE = {"image_size": 4, "patch": 2, "channels": 3}
KINDS: dict[str, dict[str, Any]] = {
    "flow": {
        "modalities": {"image": {"type": "continuous_patches", "mask": "bidirectional"} | PICTURE},
        "objective": {"type": "flow", "drop_context": 0.2},
    },
    "ids": {"modalities": {"image": {"type": "patches", "codes": 8} | PICTURE}},
}


def drawing(colour: str, number: int) -> bytes:
    from PIL import Image

    noise = np.random.default_rng(number).integers(-20, 21, (4, 4, 3))
    content = io.BytesIO()
    Image.fromarray((np.array(COLOURS[colour]) + noise).clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawings")
    for split, count in (("train", 90), ("val", 24)):
        documents = []
        for n in range(count):
            colour = list(COLOURS)[n % 3]
            parts = [colour, drawing(colour, n + 1000 * (split == "val"))]
            each = sample(f"{n:03d}", *(parts if n % 2 else reversed(parts)))
            each["json"] = json.dumps(json.loads(each["json"]) | {"category": colour}).encode()
            documents.append(each)
        documents.append(sample("999", "no drawing"))
        write_shard(folder / f"drawings-{split}.tar", documents)
    return folder


def trained(folder: Path, out: Path) -> None:
    import pretrain.train
    from tests.pretrain.runs import one_rendezvous

    layer = {"mixer": {"type": "attention", "heads": 2}, "feedforward": {"type": "dense", "d_ff": 64}}
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for kind, changes in KINDS.items():
            recipe = tiny_recipe(
                folder,
                out / kind,
                **{name: section for name, section in changes.items() if name != "modalities"},
                model={"d_model": 32, "layers": [layer, layer]},
                data={"sequence_length": 32},
                train={"steps": 30, "global_batch": 8, "micro_batch": 8, "log_every": 10},
            )
            recipe["modalities"] = {"text": {"type": "bytes"}} | changes["modalities"]
            if kind != "ids":
                recipe["objective"] = changes["objective"]
            path = out / f"{kind}.yaml"
            path.write_text(yaml.safe_dump(recipe))
            assert pretrain.train.main([str(path)]) == 0


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    run_ranks("tests.tools.examples.test_evaluate_drawings:trained", 1, out / "scratch", 200, folder=folder, out=out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_the_command(runs: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(runs / f"{kind}.yaml"), "--captions", "12", "--steps", "8", "--guidance", "2"]
    assert evaluate_drawings.main(command) == 0
    summary = json.loads((runs / kind / "report" / "summary.json").read_text())
    assert summary["drawings"] == 12 and summary["classifier_accuracy_on_held_out"] == 1.0
    assert summary["category_as_asked"]["value"] > summary["category_for_shuffled_captions"]["value"]
    assert summary["copies"] == 0 or kind == "ids"
    assert (runs / kind / "report" / "drawings.png").stat().st_size > 5000
    assert "caption found among" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_each_caption_by_itself(runs: Path, folder: Path, kind: str) -> None:
    """After each picture, and without one."""
    run = zoo.load(runs / kind)
    model, data = run.model, run
    held_out = read_captioned(str(folder), "*val*.tar", run).pick(np.arange(2))
    image, text, words = data.grammars["image"], data.grammars["text"], data.vocabulary
    said = scores(run, [*held_out.images], ["red", "a green one"])
    for row, picture in enumerate(held_out.images):
        content = data.modalities["image"].encode(picture)
        for column, caption in enumerate(("red", "a green one")):
            end = [*text.tokens(data.modalities["text"].encode(caption)), words.eos]
            tokens = torch.tensor([[words.bos, *image.tokens(content), *end]]).long()
            kinds = torch.from_numpy(words.modality_of(tokens.numpy())).long()
            item = None if kind == "ids" else torch.where(kinds == 1, 0, -1)
            context = TokenContext.from_modality(kinds, item=item, routing=CAUSAL)
            carried = {} if kind == "ids" else {"image": torch.from_numpy(content)}
            with torch.no_grad():
                log_p = model(tokens, context, content=carried)[0].log_softmax(-1)
            expected = sum(float(log_p[-len(end) + n - 1, token]) for n, token in enumerate(end))
            assert said[row, column] == pytest.approx(expected, abs=1e-3)
    blank = scores(run, [None], ["red"])
    assert blank.shape == (1, 1) and abs(blank[0, 0] - said[0, 0]) > 1e-4


def test_drawings_of_a_batch_are_those_of_each_caption(runs: Path) -> None:
    run, sampling = zoo.load(runs / "flow"), Sampling(steps=4, guidance=2.0, clip=1.0)
    together = draw(run, ["red", "a drawing in blue"], sampling, 1.0, seed=7)
    first = draw(run, ["red"], sampling, 1.0, seed=7)
    assert together.shape == (2, 4, 4, 3)
    np.testing.assert_allclose(together[0].astype(int), first[0].astype(int), atol=1)


def test_figures_by_hand() -> None:
    share = Share.of(np.array([1.0] * 75 + [0.0] * 25))
    assert share.value == 0.75 and 0.64 < share.low < 0.70 < 0.80 < share.high < 0.86
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    training = np.concatenate([white, black + 3])
    assert distances(picture_rows(black), picture_rows(training)) == pytest.approx([3.0]) and nearest(
        black, training
    ).tolist() == [1]
    random = np.random.default_rng(0)
    images = np.concatenate([random.integers(0, 90, (40, 8, 8, 3)), random.integers(160, 255, (40, 8, 8, 3))])
    names = np.array(["dark"] * 40 + ["bright"] * 40)
    classify = classifier(Captioned(images.astype(np.uint8), [""] * 80, names))
    assert (classify(images.astype(np.uint8)[::7]) == names[::7]).all()


def test_drawings_are_read_as_the_modality_sees_them(folder: Path) -> None:
    """Also by tokenizers that have sizes of their own, and no file is asked for."""
    config = zoo.modalities.VQ.Config(path="nowhere", sizes=[(4, 8)], aspect="pad", patch=4, codes=8)
    run: Any = SimpleNamespace(modalities={"image": SimpleNamespace(config=config)})
    found = read_captioned(str(folder), "*val*.tar", run)
    assert found.images.shape == (24, 4, 8, 3) and found.categories[:3].tolist() == list(COLOURS)
    assert (found.images[:, :, [0, 7]] == 255).all(), "padded with white"


def test_errors(runs: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "drawings-train.tar", [sample("0", "text")])
    run = zoo.load(runs / "ids")
    with pytest.raises(ValueError, match="no document of .* has one picture, one text and a category"):
        read_captioned(str(tmp_path), "*train*.tar", run)
    assert evaluate_drawings.main([str(runs / "flow.yaml"), "--steps", "0"]) == 2
    assert "drawing.steps: 0: must be greater than 0" in capsys.readouterr().err
