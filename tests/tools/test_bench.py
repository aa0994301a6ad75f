"""`python -m tools.bench`: the statistics, the rule of quiet rounds, rows that read one way, and its command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from tests.pretrain.data.samples import png, sample, write_shard
from tools.bench import __main__ as bench
from tools.bench import benchmark, data, measure, report, repositories
from tools.bench.benchmark import HIGHER, LOWER, Comparison, Goal, Group, Settings, TableRow, Unavailable, goals
from tools.bench.measure import BOTH, FORWARD, Sample, Variant
from zoo import UserError

QUICK = ["--quick", "--rounds", "1", "--threads", "1"]
KEYS = {"name", "ours_ms", "other_ms", "ratio", "target", "aim", "met", "mode", "spread", "better", "floor", "note"}


def samples(*walls: float, others: float | None = 0.0, cpu: float = 1.0) -> list[Sample]:
    return [Sample(wall, cpu, others) for wall in walls]


def over(ours: float, other: float) -> float:
    return ours / other


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_medians_and_the_rounds_ratios() -> None:
    reading = measure.read(samples(1.0, 2.0, 9.0), samples(4.0, 4.0, 3.0, cpu=2.0), over)
    assert (reading.ours_ms, reading.other_ms, reading.ratio) == (2000.0, 4000.0, 0.5)
    assert reading.spread == (0.25, 3.0) and reading.cpu_ratio == 0.5
    assert (reading.rounds, reading.busy) == (3, False)


def test_only_clean_rounds_count_where_there_are_three() -> None:
    """A round is clean when both of its samples are; CPU times are of all rounds."""
    ours = [*samples(1.0, 1.0, 1.0), *samples(50.0, others=0.2), *samples(1.0)]
    other = [*samples(2.0, 2.0, 2.0, 2.0), *samples(90.0, others=1.5)]
    reading = measure.read(ours, other, over)
    assert (reading.ratio, reading.rounds, reading.busy) == (0.5, 3, False)
    assert reading.spread == (0.5, 0.5)


def test_a_busy_machine_is_marked() -> None:
    ours = [*samples(1.0, 1.0), *samples(4.0, 4.0, 4.0, others=1.0)]
    reading = measure.read(ours, samples(2.0, 2.0, 2.0, 2.0, 2.0), over)
    assert (reading.ratio, reading.rounds, reading.busy) == (2.0, 5, True)
    assert not measure.read(samples(1.0), samples(2.0), over).busy, "one round was asked for, and it is clean"
    assert not measure.read(samples(1.0, others=None), samples(2.0, others=None), over).busy, "nothing is known"


def test_what_others_use_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machine time that is not this process's belongs to others."""
    busy = iter([100.0, 107.0])
    monkeypatch.setattr(measure, "busy_seconds", lambda: next(busy))
    clock, own = iter([0.0, 4.0]), iter([0.0, 3.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(own))
    sample = measure.take(lambda: None, 2)
    assert sample == Sample(wall=2.0, cpu=1.5, others=1.0) and not sample.clean


def test_rounds_turn_and_end_when_time_is_up_but_not_before_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    order: list[str] = []
    tasks = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    ticks: list[None] = []
    found = measure.measure(tasks, 5, seconds=0.0, tick=lambda: ticks.append(None))
    assert "".join(order) == "aabb" + "ab" + "ba" + "ab", "warm-up, then three rounds"
    assert [len(values) for values in found.values()] == [3, 3] and len(ticks) == 5


def test_a_backward_pass_reaches_every_leaf() -> None:
    x, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    seen: list[str] = []
    x.register_hook(lambda gradient: seen.append("x"))
    weight.register_hook(lambda gradient: seen.append("weight"))
    variant = Variant(lambda: (x * weight, x.sum()), [x, weight])
    variant.forward()
    assert not seen
    variant.forward_backward()()
    assert sorted(seen) == ["weight", "x"] and x.grad is None


# ---------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("pair", "ratio", "floor", "title"),
    [
        (Comparison("ours", "other"), 2.0, None, "ours / other"),
        (Comparison("ours", "other", HIGHER), 0.5, None, "other / ours"),
        (Comparison("ours", "other", LOWER, expected=1.6), 1.25, 1600.0, "(ours / other) / predicted 1.600"),
        (Comparison("ours", "other", HIGHER, expected=1.6), 0.8, 1600.0, "(other / ours) / predicted 0.62"),
        (Comparison("ours", None, HIGHER, floor_ms={BOTH: 500.0}), 0.25, 500.0, "least time / ours"),
    ],
)
def test_a_row_says_which_way_it_reads(pair: Comparison, ratio: float, floor: float | None, title: str) -> None:
    (row,) = Group(comparisons=[pair]).rows("test", BOTH, {"ours": samples(2.0), "other": samples(1.0)})
    assert row.ratio == pytest.approx(ratio) and row.floor == (None if floor is None else pytest.approx(floor))
    assert row.name == f"test: {title}" and row.better == pair.better
    assert row.other_ms == (None if pair.other is None else 1000.0)


@pytest.mark.parametrize(("better", "met", "aim_met"), [(LOWER, True, False), (HIGHER, False, True)])
def test_goals(better: str, met: bool, aim_met: bool) -> None:
    pair = Comparison("ours", "other", better, goals(both=Goal(target=1.1, aim=0.9)))
    forward, both = (
        Group(comparisons=[pair]).rows("test", mode, {"ours": samples(1.0), "other": samples(1.0)})[0]
        for mode in (FORWARD, BOTH)
    )
    assert (both.met, both.aim_met) == (met, aim_met)
    assert (forward.target, forward.met, forward.aim_met) == (None, None, None)


def test_rows_survive_their_file(tmp_path: Path) -> None:
    row = TableRow("test: a / b", BOTH, 1.0, 2.0, 0.5, LOWER, 1.1, None, (0.4, 0.6), 0.5, 1.5, 3, True, "a note")
    facts = report.conditions("cpu", False, 3)
    report.write_json(tmp_path / "rows.json", facts, [row], {"other": "why"})
    found, (again,), skipped = report.read_json(tmp_path / "rows.json")
    assert (found, skipped) == (facts, {"other": "why"})
    assert again.to_dict() == {**row.to_dict(), "spread": [0.4, 0.6]}
    with pytest.raises(UserError, match="rows.yaml: No such file or directory; give a file that --json wrote"):
        report.read_json(tmp_path / "rows.yaml")
    (tmp_path / "rows.yaml").write_text("{}")
    with pytest.raises(UserError, match="not a file that --json wrote"):
        report.read_json(tmp_path / "rows.yaml")


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.slow
def test_every_benchmark_runs_at_small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each builds, and each of its tasks runs; those that need a checkout say so."""
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    console = Console(quiet=True)
    rows, skipped = bench.run(benchmark.known("cpu"), Settings(quick=True), 1, False, console)
    for name, reason in skipped.items():
        assert reason.startswith("needs ") or "mamba-ssm's" in reason or "no compiled" in reason, name
    assert all("needs a checkout" in skipped[name] for name in ("mamba.official", "mot.official", "mod.astramind"))
    measured = {row.name.partition(": ")[0] for row in rows}
    assert measured | set(skipped) == {found.name for found in benchmark.known("cpu")}
    assert {
        "moma.512",
        "mot.512",
        "mod",
        "model.flops",
        "model.optimizer",
        "adapt.prefill",
        "attention.packed",
    } <= measured
    assert all(row.ratio > 0 for row in rows)


def test_an_interrupted_run_keeps_its_rows() -> None:
    def stop(settings: Settings) -> Group:
        raise KeyboardInterrupt

    def figure(settings: Settings) -> Group:
        return Group(figures=[TableRow("figure", FORWARD, None, None, 1.0, LOWER, None, None)])

    order = [benchmark.Benchmark(name, "cpu", "", build) for name, build in (("a", figure), ("b", stop), ("c", figure))]
    rows, skipped = bench.run(order, Settings(), 1, False, Console(quiet=True))
    assert [row.name for row in rows] == ["a: figure"]
    assert skipped == {"b": "interrupted", "c": "interrupted"}


def test_json_page_and_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.01)
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    assert bench.main(["attention.packed", *QUICK, "--json", str(file), "--profile"]) == 0
    printed = capsys.readouterr().out
    assert "document" in printed and "aten::" in printed
    facts = json.loads(file.read_text())
    assert facts["quick"] and facts["machine"]["threads"] == 1 and facts["versions"]["torch"] == torch.__version__
    assert len(facts["rows"]) == 4 and all(row.keys() >= KEYS for row in facts["rows"])
    both = next(row for row in facts["rows"] if row["mode"] == BOTH)
    assert both["ratio"] == pytest.approx(both["other_ms"] / both["ours_ms"])
    assert both["better"] == HIGHER and both["target"] == 3.0 and both["met"] == (both["ratio"] >= 3.0)

    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert bench.main(["--read", str(file), "--page", str(page)]) == 2
    assert "rows of --quick are not figures for a page" in capsys.readouterr().err
    file.write_text(json.dumps({**facts, "quick": False, "skipped": {"mot.official": "why"}}))
    assert bench.main(["--read", str(file), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert f"{both['ratio']:.2f}" in text and "**`attention.packed`** Five packed documents" in text
    assert "`mot.official`: why" in text
    page.write_text("no markers")
    assert bench.main(["--read", str(file), "--page", str(page)]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scam"], "scam: no benchmark on cpu begins so"),
        (["moma.51"], None),
        (["mot.official", *QUICK], "nothing was measured"),
        (["--peer", "mixture_of_mambas=x"], "(did you mean 'mixture_of_mamba'?)"),
        (
            ["--peer", "mixture_of_mamba=/nowhere"],
            "/nowhere is not a folder; give a checkout of github.com/Weixin-Liang",
        ),
        (["data.real", *QUICK], "nothing was measured"),
        (["data.real", "--data", "/nowhere"], "--data /nowhere: is not a folder; give one of tar shards"),
        (["--read", "/nowhere.json"], "/nowhere.json: No such file or directory"),
    ],
)
def test_what_is_asked_wrongly(arguments: list[str], message: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if message is None:
        assert [found.name for found in benchmark.select(arguments, "cpu")] == ["moma.512"]
        return
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(found.name in printed and found.about for found in benchmark.known())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--device", "cuda", "cuda.moma"]) == 2
    assert "--device cuda: there is none here" in capsys.readouterr().err


def test_a_checkout_is_loaded_without_a_trace(tmp_path: Path) -> None:
    """The package's own __init__ does not run, absent modules are as told, and nothing stays behind."""
    (tmp_path / "MoD").mkdir()
    (tmp_path / "MoD" / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "MoD" / "MoD.py").write_text(
        "from some_kernels.ops import scan\ntry:\n    import json\nexcept ImportError:\n    json = None\n"
    )
    settings, before = Settings(peers={"mixture_of_depths": tmp_path}), dict(sys.modules)
    kernels = {"some_kernels": repositories.stub(), "some_kernels.ops": repositories.stub(scan=3), "json": None}
    module = repositories.load(settings, "mixture_of_depths", "MoD.MoD", **kernels)
    assert (module.scan, module.json) == (3, None)
    assert sys.modules == before and str(tmp_path) not in sys.path
    with pytest.raises(Unavailable, match=r"give the folder of a checkout of github.com/astramind-ai"):
        repositories.load(settings, "mixture_of_depths", "MoD.other")
    with pytest.raises(Unavailable, match="--peer mixture_of_mamba=FOLDER"):
        repositories.load(settings, "mixture_of_mamba", "MixtureOfMamba")


def test_a_rank_at_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the benchmark of the data path asks of a process, the first and another, here on few documents."""
    monkeypatch.setattr(data, "SHARD", 100)
    monkeypatch.setattr(data, "SAMPLING", 0.0)
    monkeypatch.setattr("pretrain.data.plan.IN_MEMORY", 0)
    lines = [json.dumps(vars(record) | {"folder": ""}) for record in data.synthetic(tmp_path, 250)]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    figures = []
    for _ in range(2):
        data.measure_rank(str(tmp_path))
        figures.append(data.Figures.parse(capsys.readouterr().out))
    first, other = figures
    assert len(lines) == 3 and first.pieces == other.pieces > 250 and first.shared == other.shared > 4 * 4 * 250
    assert 0 < first.padding < 0.1 and first.start.wall > 0 and other.row.wall > 0 and first.peak >= first.private


@pytest.mark.slow
def test_real_documents(tmp_path: Path) -> None:
    """Documents and rows of a folder are measured; the numbers are of this machine."""
    random = np.random.default_rng(0)
    for shard in range(3):
        parts = [(" ".join(map(str, random.integers(0, 999, 80))), png(n + 50 * shard, 32)) for n in range(40)]
        write_shard(tmp_path / f"{shard}.tar", [sample(f"{n}", *part) for n, part in enumerate(parts)])
    rows, skipped = bench.run(
        benchmark.select(["data.real"], "cpu"), Settings(quick=True, data=tmp_path), 1, False, Console(quiet=True)
    )
    assert not skipped and {row.name.partition(": ")[2] for row in rows} >= {"a document: 2 workers, 1 worker"}
    assert all(row.ratio > 0 for row in rows)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    names = ["cuda.adapt", "cuda.moma", "cuda.mod", "cuda.mfu.dense", "cuda.mfu.moma"]
    assert bench.main([*names, "--device", "cuda", "--quick", "--rounds", "3", "--json", str(file)]) == 0
    facts = json.loads(file.read_text())
    assert "CUDA" in facts["machine"]["device"]
    measured = {row["name"].partition(": ")[0] for row in facts["rows"]}
    assert {"cuda.adapt.prefill", "cuda.adapt.decode", "cuda.moma", "cuda.mod"} <= measured
    assert all(row["ratio"] > 0 for row in facts["rows"])
