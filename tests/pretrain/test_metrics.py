"""metrics.jsonl after a kill, and TensorBoard after a resume."""

from __future__ import annotations

import json
from pathlib import Path

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
