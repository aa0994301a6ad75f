"""metrics.jsonl after a kill, and TensorBoard after a resume."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from pathlib import Path

import pytest

from pretrain import metrics
from tests.pretrain.runs import assert_tensorboard_agrees


def test_half_a_line_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n{"step": 2, "eval/loss": 0.3}\n{"step": 3, "lo'
    )
    assert [item["step"] for item in metrics.read(path)] == [1, 2, 2]
    metrics.cut(path, 2)
    assert path.read_text().endswith('{"step": 2, "eval/loss": 0.3}\n')
    metrics.cut(path, 1)
    assert path.read_text() == '{"step": 1, "loss": 0.1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_cut_keeps_every_digit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"step": 1, "loss": 0.1 + 0.2, "small": 5e-324, "large": 1.7976931348623157e308, "bad": float("inf")}
    path.write_text(json.dumps(values) + "\n")
    metrics.cut(path, 1)
    assert metrics.read(path) == [values]


def test_cut_without_a_file(tmp_path: Path) -> None:
    metrics.cut(tmp_path / "metrics.jsonl", 3)
    assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_a_resumed_run_shows_nothing_twice(tmp_path: Path) -> None:
    """Killed after step 5 (nothing is closed), resumed at 3, killed again, resumed at 4."""
    for resumed_at, last in ((None, 5), (3, 6), (4, 8)):
        writer = metrics.Metrics(tmp_path, resumed_at)
        for step in range((resumed_at or 0) + 1, last + 1):
            writer.log(step, {"loss": step + 0.1 * last})
        writer.writer.flush()
    assert [(i["step"], round(10 * (i["loss"] - i["step"]))) for i in metrics.read(tmp_path / "metrics.jsonl")] == [
        (1, 5),
        (2, 5),
        (3, 5),
        (4, 6),
        *((step, 8) for step in range(5, 9)),
    ]
    assert_tensorboard_agrees(tmp_path)


def test_a_new_run_in_an_old_folder_starts_empty(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        writer = metrics.Metrics(tmp_path, None)
        writer.log(1, {"loss": value})
        writer.close()
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    assert_tensorboard_agrees(tmp_path)


def test_lines_that_cannot_be_read_are_kept_aside(tmp_path: Path) -> None:
    """All history after them stays."""
    good = [b'{"step": %d, "loss": 1.0}\n' % step for step in range(1, 8)]
    bad = [
        b"[]\n",
        b'{"loss": 2.0}\n',
        b'{"step": "3"}\n',
        b'{"step": true}\n',
        b'{"step": 4, "l\xff": 1}\n',
        b"\n",
        b"[" * 9999 + b"\n",
    ]
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"step": 8, "lo')
    assert [item["step"] for item in metrics.read(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    said: list[str] = []
    metrics.Metrics(tmp_path, 5, said.append).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(good[:5])
    assert (tmp_path / "metrics.unreadable").read_bytes() == b"".join(bad)
    assert len(said) == 1
    assert said[0].endswith("lines that cannot be read (2, 4, 6, 8, 10, …; 7 in all) now stand in metrics.unreadable")
    metrics.Metrics(tmp_path, 4, said.append).close()
    assert (tmp_path / "metrics.unreadable").read_bytes() == b"".join(bad) and len(said) == 1


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    """Written so that any JSON reader takes the line, and read as numbers; TensorBoard gets them as they are."""
    writer = metrics.Metrics(tmp_path, None)
    writer.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "low": float("-inf"), "tokens": 3})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    strict = json.loads(text, parse_constant=refuse)
    assert strict == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "low": "-Infinity", "tokens": 3}
    (item,) = metrics.read(tmp_path / "metrics.jsonl")
    assert math.isnan(item.pop("loss")) and item == {"step": 1, "grad_norm": math.inf, "low": -math.inf, "tokens": 3}


def test_a_long_history_is_cut_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(100_000):
            file.write(json.dumps({"step": step, "loss": 1 / (step + 1), "loss/text": 0.5, "lr": 1e-4}) + "\n")
    tracemalloc.start()
    metrics.cut(path, 90_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20, f"{peak:,} bytes"
    assert len(metrics.read(path)) == 90_001


def test_a_clock_that_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an hour at each resume, and one in the same second: TensorBoard shows what `metrics.jsonl` has."""
    now = time.time()
    for hours, resumed_at, last in ((0, None, 5), (1, 3, 6), (2, 4, 8), (2, 7, 9)):
        monkeypatch.setattr(time, "time", lambda hours=hours: now - 3600 * hours)
        writer = metrics.Metrics(tmp_path, resumed_at)
        for step in range((resumed_at or 0) + 1, last + 1):
            writer.log(step, {"loss": step + 0.1 * last})
        writer.writer.flush()
    assert_tensorboard_agrees(tmp_path)
