"""Pictures of a run's losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain import report


def test_the_losses_of_the_recipes_modalities_are_drawn_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else an objective reports: a regulariser, a length."""
    (tmp_path / "recipe.yaml").write_text("modalities: {text: {type: bytes}, strokes: {type: pen}, unseen: {}}")
    lines = [
        {
            "step": step,
            "tokens": 10 * step,
            "loss/text": 3.0,
            "loss/strokes": 2.0,
            "loss/z": 9.0,
            "loss/strokes/length": 1,
        }
        for step in (1, 2)
    ]
    lines.append({"step": 2, "tokens": 20, "eval/causal/loss/text": 2.5, "eval/causal/loss/z": 8.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(report, "_save", lambda figure, path: figure)
    figure: Any = report.draw_losses(tmp_path)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["strokes, training", "text, training", "text, validation (causal)"]
