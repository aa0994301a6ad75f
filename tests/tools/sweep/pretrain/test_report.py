"""The report: what curves say, of a sweep and of runs named one by one."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.browser import opened
from tests.tools.sweep.pretrain.sweeps import config as sweep_config
from tests.tools.sweep.pretrain.sweeps import write_run
from tools import compare
from tools.sweep.pretrain import savings
from tools.sweep.pretrain.curves import curves, evaluations
from tools.sweep.pretrain.plan import plan
from tools.sweep.pretrain.report import write
from tools.sweep.pretrain.settings import parse
from tools.sweep.pretrain.study import of_runs, of_sweep
from tools.sweep.pretrain.tables import tables
from zoo.config import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds of two arms: `sparse` loses 0.8 of `dense`, which saves 1 − 0.8² of everything; `worse` 1.5."""
    folder = tmp_path_factory.mktemp("runs")
    arms = {"dense": 1.0, "sparse": 0.8, "worse": 1.5}
    return [
        write_run(folder / f"{name}_{seed}", name, seed, scale, name != "dense")
        for name, scale in arms.items()
        for seed in range(3)
    ]


@pytest.fixture(scope="module")
def report(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    assert compare.main([*map(str, folders), "--out", str(out)]) == 0
    return out


def test_what_it_says(report: Path) -> None:
    text = (report / "report.md").read_text()
    row = r"\| sparse \| one \| all \| 0\.640 \[0\.6\d\d, 0\.6\d\d\] \| 1\.56\d \[1\.\d+, 1\.\d+\] \|"
    assert re.search(row, text), text
    assert "| worse | one | all | not reached: > 1.000 [not reached, not reached] | < 1.000" in text
    assert re.search(r"\| sparse − dense \| one \| text \| -0\.0903 ± 0\.\d+ \|", text), (
        "0.2 of the dense model's 0.4517"
    )
    assert "| dense | one | 0.4517 ± 0.0045 | 0.4517 ± 0.0045 | 0.9034 ± 0.0089 |  |  |  | 3 |" in text
    assert "| 90.0% ± 0.0% | 70.0% ± 0.0% | 3 |" in text
    assert "| sparse | one | 1 | all | text 1.500 | 0.800 ± 0.000 | 0.250 ± 0.000 |" in text
    assert "256.0 MiB" in text and "validation documents, whose losses are not kept" in text
    assert "Over sizes" not in text and "Not finished" not in text


def test_arms_that_are_compared_with_each_other(folders: list[Path]) -> None:
    study = dataclasses.replace(of_runs(folders, None), compare={"sparse": "worse"})
    gaps = next(table for table in tables(study) if table.heading == "Difference in loss")
    found = {(row[0], row[2]): row[3] for row in gaps.rows}
    assert sorted({arms for arms, _ in found}) == ["sparse − dense", "sparse − worse", "worse − dense"]
    both = [float(found[f"{arm} − dense", "text"].partition(" ")[0]) for arm in ("sparse", "worse")]
    assert float(found["sparse − worse", "text"].partition(" ")[0]) == pytest.approx(both[0] - both[1], abs=2e-4)


def test_runs_on_other_data_are_not_mixed(tmp_path: Path) -> None:
    """A row that another machine made with tokenizers that it fitted itself."""
    config = parse({k: v for k, v in sweep_config(tmp_path, "data").items() if k != "type"}, tmp_path)
    points = plan(config)
    for number, point in enumerate(points):
        folder = tmp_path / "out" / "runs" / point.name
        write_run(folder / "trained", point.arm, 0, 1.0)
        (folder / "trained" / "environment.json").write_text(json.dumps({"commit": f"{number}234567890"}))
        (folder / "result.json").write_text(json.dumps({"data": f"abc{number}", "validation": "x", "last": {}}))
    with pytest.raises(UserError, match="size one: runs were trained on different data: abc0 dense-one-0; abc1 moma"):
        of_sweep(config, points, tmp_path / "out")
    study = of_sweep(config.model_copy(update={"vary": ["data"]}), points, tmp_path / "out")
    assert len(study.runs) == 2 and "Runs were made by the commits 0234567, 1234567." in study.notes


def test_the_page_stands_alone(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count('src="data:image/svg+xml;base64,') == 2 and not re.search(r'(src|href)="(?!data:)', page)
    assert "0.640" in page and "<table>" in page and page.isascii() is False
    names = sorted(path.name for path in (report / "figures").iterdir())
    assert names == ["curves-one.png", "curves-one.svg", "routers-one.png", "routers-one.svg"]


def test_hyperparameters_in_tensorboard(report: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    events = EventAccumulator(str(report / "hparams" / "sparse-one-2"))
    events.Reload()
    (loss,) = events.Scalars("eval/causal/loss/all")
    assert loss.value == pytest.approx(0.8 * 1.02 * 5**-0.5)
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["arm"].string_value == "sparse" and values["seed"].number_value == 2


def test_chromium_shows_it(report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    with opened((report / "report.html").as_uri()) as page:
        page.screenshot(path=shot)
    with Image.open(shot) as picture:
        colors = picture.convert("RGB").resize((130, 160)).getcolors(130 * 160)
    assert colors is not None and len(colors) > 50, "there are words and lines on it"


def test_trainings_in_a_row_are_one_curve(tmp_path: Path) -> None:
    """The second goes on from the tokens, FLOPs and seconds of the first."""
    first = write_run(tmp_path / "a", "a", 0, 1.0, points=2)
    second = write_run(tmp_path / "b", "b", 0, 0.5, points=3)
    found = evaluations([first, second])
    assert [each.used["tokens"] for each in found] == [1000, 2000, 3000, 4000, 5000]
    curve = curves(found, "flops")["image"]
    assert list(curve.x) == [1e6, 2e6, 3e6, 4e6, 5e6] and curve.loss[2] == 1.0


def test_runs_that_are_no_pair(folders: list[Path], tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", "other", 1, 1.0, tokens=1001)
    study = of_runs([*folders[:3], other], None)
    with pytest.raises(
        UserError, match="other-one-1 and dense-one-1 are no pair: after step 1 one has seen 1,001 tokens"
    ):
        write(study, tmp_path / "out")


def test_what_compare_refuses(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        ([str(tmp_path)], "holds no recipe.yaml; give folders of runs"),
        ([str(folders[0])] * 2, "a run of dense with seed 0 is named already"),
        ([str(folders[0]), "--baseline", "moma"], "--baseline: 'moma' is none of dense"),
    ):
        assert compare.main([*words, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err


def test_a_run_without_causal_evaluations_has_no_curve(tmp_path: Path) -> None:
    run = write_run(tmp_path / "topk", "topk", 0, 1.0)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    renamed = [{key.replace("causal", "topk"): value for key, value in line.items()} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in renamed))
    written = write(of_runs([run], None), tmp_path / "out")
    assert "Savings" not in written[1].read_text()


def test_other_documents(tmp_path: Path) -> None:
    """Losses of redrawn documents are what an evaluation on them would have reported, the same draw for both runs."""
    runs = [
        write_run(tmp_path / f"{name}_{seed}", name, seed, scale, documents=20)
        for name, scale in (("dense", 1.0), ("sparse", 0.8))
        for seed in range(2)
    ]
    study = of_runs(runs, None)
    dense, sparse = study.of("dense", "one")[0], study.of("sparse", "one")[0]
    drawn = dense.redrawn
    assert sorted(drawn) == ["all", "image", "text"] and drawn["text"].shape == (savings.DRAWS, 5)
    assert drawn["text"].mean(0) == pytest.approx(dense.curves("tokens")["text"].loss, rel=0.02)
    assert drawn["image"] == pytest.approx(2 * drawn["text"]) and drawn["all"] == pytest.approx(1.5 * drawn["text"])
    assert sparse.redrawn["text"] == pytest.approx(0.8 * drawn["text"])
    (pair, _) = study.pairs("sparse", "one", "tokens", "text")
    found = savings.gap([pair])
    assert found.difference == pytest.approx(-0.2 * 5**-0.5) and 0.01 < found.by_document < 0.05
    assert savings.saving([pair]).interval is not None
    text = write(study, tmp_path / "out")[1].read_text()
    assert "and over validation documents, the same for all" in text and "widened by that over the choice" in text
