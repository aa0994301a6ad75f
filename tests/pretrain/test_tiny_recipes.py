"""Every recipe of recipes/tiny trains and does what its header says."""

from __future__ import annotations

import contextlib
import io
import math
import re
import time
from pathlib import Path

import pytest
import torch

import zoo
from pretrain import metrics
from pretrain import recipe as recipes
from tests.pretrain.ranks import run_ranks
from tests.pretrain.runs import ROOT

FOLDER = ROOT / "recipes" / "tiny"
GUESSES = ("unigram", "constant")
"""What the best constant guess is reported as; for channels it is not."""
LEVELS = 16
pytestmark = pytest.mark.timeout(900)
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SPEECH = {name for name in NAMES if "speech" in recipes.load(FOLDER / f"{name}.yaml").modalities}
"""Recipes of spoken words; here they get tones, so that their headers' numbers are not theirs here."""


def trained(data: Path, spoken: Path, folder: Path) -> dict[str, float]:
    """Train every recipe on one rank, a step's rows in one micro-batch: half the passes, and the same updates but where
    tokens compete over the micro-batch. Returns the seconds each took."""
    import pretrain.train
    from tests.pretrain.runs import one_rendezvous

    seconds = {}
    with one_rendezvous(), contextlib.redirect_stdout(io.StringIO()):
        for name in NAMES:
            began = time.monotonic()
            changes = [
                f"data.path={spoken if name in SPEECH else data}",
                f"run_dir={folder / name}",
                "train.micro_batch=8",
            ]
            assert pretrain.train.main([str(FOLDER / f"{name}.yaml"), *changes]) == 0, name
            seconds[name] = time.monotonic() - began
    return seconds


@pytest.fixture(scope="module")
def runs(
    digit_shards: Path, spoken_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("tiny_recipes")
    target = "tests.pretrain.test_tiny_recipes:trained"
    data = {"data": digit_shards, "spoken": spoken_shards}
    return folder, run_ranks(target, 1, folder / "scratch", 800, **data, folder=folder)[0]


def header(name: str) -> str:
    """The comment a recipe begins with, on one line."""
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    return " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))


@pytest.mark.parametrize("name", NAMES)
def test_it_trains(runs: tuple[Path, dict[str, float]], name: str) -> None:
    """The loss falls, and validation, causal, is better than the best constant guess and near the header's number."""
    items = metrics.read(runs[0] / name / "metrics.jsonl")
    losses = [item["loss"] for item in items if "loss" in item]
    assert losses[-1] < 0.6 * losses[0]
    last = items[-1]
    for modality in recipes.load(FOLDER / f"{name}.yaml").modalities:
        loss, nothing = last[f"eval/causal/loss/{modality}"], [f"eval/{kind}/{modality}" for kind in GUESSES]
        assert loss < next((last[key] for key in nothing if key in last), math.log(LEVELS))
    said = re.search(r"Expected: .*; validation loss (\d\.\d\d)( nats a token\.|, text in nats)", header(name))
    assert said and (name in SPEECH or last["eval/causal/loss"] == pytest.approx(float(said[1]), abs=0.15))
    assert runs[1][name] < 60
    sources = recipes.load(FOLDER / f"{name}.yaml").data.sources
    step = next(item for item in reversed(items) if "loss" in item)
    assert {key.removeprefix("data/loss/") for key in step if key.startswith("data/loss/")} == set(sources)
    assert {f"data/epochs/{source}" for source in sources} <= step.keys()


@pytest.mark.parametrize("name", NAMES)
def test_its_header(name: str) -> None:
    text = header(name)
    command = f"deepspeed --num_accelerators 2 --module pretrain.train recipes/tiny/{name}.yaml data.path=FOLDER"
    assert re.match("What it shows: .+ Command: " + re.escape(command) + " .*Expected: ", text)
    assert recipes.load(FOLDER / f"{name}.yaml").name == f"tiny_{name}"
    equal = re.search(r"FLOPs(?: a token)? as (\w+)\.yaml", text)
    if equal:
        assert flops(name) == pytest.approx(flops(equal[1]), rel=1e-9)


def flops(name: str) -> tuple[float, ...]:
    """Forward FLOPs of a token of each modality, routers apart."""
    recipe = recipes.load(FOLDER / f"{name}.yaml")
    with torch.device("meta"):
        model = zoo.build("model", recipe.model, seed=None)
    return model.cost(recipe.data.sequence_length).flops


def test_the_page_names_them_all() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert {name for name in NAMES if f"| `{name}` |" not in page} == set()
