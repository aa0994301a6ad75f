"""`python -m tools.report`: where tokens go is what the model reports, and the page stands alone and answers clicks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from pretrain.evaluate import routings
from tests.browser import opened
from tools.report.__main__ import main
from tools.report.drawing import grid_shape
from tools.report.routing import Routed, look
from tools.report.usage import maps, word_table
from zoo.context import CAUSAL, TOPK
from zoo.generate import Part, document
from zoo.modalities import Piece
from zoo.prefix import together
from zoo.run import Run
from zoo.trace import Trace


@pytest.fixture(scope="module")
def folder(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to write a report into."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(trained_run / "run", folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard"))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return zoo.load(folder)


@pytest.fixture(scope="module")
def parts() -> list[Part]:
    picture = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    return [Part("text", "seven"), Part("image", picture), Part("text", "a 7")]


@pytest.mark.parametrize("routing", [CAUSAL, TOPK])
def test_where_tokens_go_is_what_the_model_counts(run: Run, parts: list[Part], routing: str) -> None:
    """By modality, and inside a Mixture-of-Depths layer among those that it let pass."""
    assert routing in routings(run.model)
    routed = look(run, parts, routing)
    piece = Piece.join([document(run, parts), Piece.of([run.vocabulary.eos], 0)])
    batch, trace = together([piece], run.model, [0], [0]), Trace(detailed=True)
    with torch.no_grad():
        run.model(batch.tokens, batch.context.replace(routing=routing, trace=trace))
    assert {*routed.passed, *routed.experts} == {*trace.statistics.usage} and len(routed.labels) == len(piece)
    for name, usage in trace.statistics.usage.items():
        taken = routed.passed[name][:, None] if name in routed.passed else routed.experts[name]
        found = [int(taken[routed.modality == m, e].sum()) for e in range(taken.shape[1]) for m in range(2)]
        assert found == [int(n) for n in usage.rows], name
    (depth,) = routed.passed.values()
    inner = [taken for name, taken in routed.experts.items() if ".block." in name]
    assert inner and not any(taken[~depth].any() for taken in inner), "who is skipped meets no expert there"


def test_what_a_document_is_called(run: Run, parts: list[Part]) -> None:
    routed = look(run, parts)
    assert routed.labels[0] == "<bos>" and routed.labels[-1] == "<eos>"
    (item,) = routed.items
    assert (item.stop - item.start, routed.labels[item.start]) == (16, "image")
    assert routed.labels[item.start - 1] == "<begin_image>" and routed.labels[item.stop] == "<end_image>"
    assert "".join(routed.labels[1 : item.start - 1]) == "seven"
    expected = run.modalities["image"].decode(run.modalities["image"].encode(parts[1].item))
    assert np.array_equal(item.part.item, expected)
    token = int(np.flatnonzero(~next(iter(routed.passed.values())))[0])
    assert re.search(r"layer 0: (text|image|no) expert.*; layer 1: skipped", routed.path(token))


def test_grids_of_pictures(run: Run) -> None:
    image, text = run.modalities["image"], run.modalities["text"]
    assert grid_shape(image, np.zeros((8, 8, 1)), 16) == (4, 4)
    assert grid_shape(image, np.zeros((24, 40, 3)), 16) == (3, 5), "its size stands before the codes"
    assert grid_shape(image, np.zeros((8, 8, 1)), 7) is None and grid_shape(text, "text", 16) is None


def test_what_experts_take_is_counted(run: Run, parts: list[Part]) -> None:
    routed = [look(run, parts), look(run, parts)]
    table = word_table(run, routed)
    total = sum(int(taken[routed[0].modality == 0].sum()) for taken in routed[0].experts.values())
    assert sum(int(row[3]) for row in table.rows) == 2 * total
    found = dict(maps(run, routed))
    (kept,) = found["layer 1: image kept"]
    item = routed[0].items[0]
    assert kept.shares == next(iter(routed[0].passed.values()))[item.start : item.stop].astype(float).tolist()


def test_the_page_stands_alone(folder: Path, trained_run: Path, capsys: Any) -> None:
    data = f"data.path={trained_run / 'moved'}"
    assert main([str(folder), data, "--samples", "2", "--documents", "2", "--seed", "1"]) == 0
    assert capsys.readouterr().out.endswith("report.html is written\n")
    page = (folder / "report" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)|url\((?!data:)', page), "it needs no other file"
    for heading in (
        "Losses by modality",
        "Losses at the end",
        "Routers",
        "Auxiliary routers",
        "Samples",
        "Words of experts",
    ):
        assert f"<h2>{heading}</h2>" in page
    assert page.count('<div class="routed"') == 4 and "layer 1: image kept" in page
    assert len(list((folder / "report" / "samples" / "step-1").glob("*/*"))) == 4


def test_without_data_it_looks_at_what_the_run_writes(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(folder), "--samples", "1", "--documents", "1", "--out", str(tmp_path / "page.html")]) == 0
    assert (
        "Documents that the run has written itself, since its data cannot be read"
        in (tmp_path / "page.html").read_text()
    )
    assert main([str(folder), "--samples", "0"]) == 2
    assert main([str(folder), "data.path=nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
def test_a_click_says_where_a_token_went(folder: Path, trained_run: Path, tmp_path: Path) -> None:
    data = f"data.path={trained_run / 'moved'}"
    assert main([str(folder), data, "--samples", "4", "--documents", "2", "--out", str(tmp_path / "report.html")]) == 0
    with opened((tmp_path / "report.html").as_uri()) as page:
        box = page.locator(".routed").first
        paths = json.loads(box.get_attribute("data-paths"))
        for place in (box.locator(".t").nth(1), box.locator(".grid i").nth(5)):
            place.click()
            token = int(place.get_attribute("data-token"))
            assert box.locator("output").inner_text() == paths[token] and "layer 1" in paths[token]
            assert box.locator(".picked").count() > 2, "in every line"
        page.locator("summary").last.click()
        assert page.locator(".routed").nth(3).is_visible()
        page.screenshot(path=str(tmp_path / "report.png"), full_page=True)
    assert (tmp_path / "report.png").stat().st_size > 50_000


def test_no_routed_layers() -> None:
    routed = Routed(["a"], np.zeros(1), [], {}, {})
    assert routed.path(0) == "no routed layers" and routed.layers() == {}
