"""What the report of a sweep says, by accuracy and by perplexity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tools.sweep.adapt.sweeps import ARMS, parsed
from tools.sweep.adapt import report
from tools.sweep.adapt.plan import AdaptPoint
from tools.sweep.chance import Scores, compare


def judged(accuracy: float, flops: float) -> dict[str, Any]:
    return {
        "accuracy": accuracy,
        "kinds": {"cell": accuracy},
        "questions": 10,
        "marks": [int(n < 20 * accuracy) for n in range(20)],
        "flops": flops,
        "keys_and_values": flops,
        "skip": {"layers.1": 0.5},
        "routers": {"accuracy": 0.875},
    }


def told(loss: float, flops: float) -> dict[str, Any]:
    """Answers of 1 to 20 tokens; the loss of a token is now above, now below the mean."""
    tokens = list(range(1, 21))
    spread = [0.02 * n * (-1) ** (n // 2) for n in tokens]
    losses = [loss * n + each - sum(spread) / 20 for n, each in zip(tokens, spread, strict=True)]
    values = {key: value for key, value in judged(0.0, flops).items() if key not in ("accuracy", "kinds", "marks")}
    return values | {"loss": sum(losses) / sum(tokens), "losses": losses, "tokens": tokens}


def write_results(
    out: Path,
    values: dict[str, list[float]],
    judged: Callable[[float, float], dict[str, Any]] = judged,
    first: float = 0.1,
) -> list[AdaptPoint]:
    """Results of arms and seeds, of models of these values after tuning, and `first` before."""
    points = []
    for arm, each in values.items():
        target = 1.0 if arm == "dense" else 0.7
        for seed, value in enumerate(each):
            adapt = {"auxiliary": {"type": "membership"}} if target < 1 else None
            point = AdaptPoint(
                arm, target, seed, adapt, True, {1 if arm == "arank" else 2: 0.25} if adapt else {}, target
            )
            folder = out / "runs" / point.name
            folder.mkdir(parents=True)
            result = {"before": judged(first, target), "after": judged(value, target), "training_seconds": 10 * target}
            if arm == "dense" and first > 1:
                result["exchanged"] = judged(3.0 + 0.01 * seed, target)
            if arm == "arank":
                result["threshold"] = {**judged(0.5, 0.69), "validation": {"reached": seed > 0}}
            (folder / "result.json").write_text(json.dumps(result))
            points.append(point)
    return points


@pytest.mark.parametrize(
    ("rival", "said"),
    [
        (
            [0.4, 0.5, 0.45],
            r"ARank's choice answers more questions \(\+35\.0 points, ± 12\.4 over 3 seeds, ± 21\.8 over",
        ),
        ([0.75, 0.7, 0.75], r"not shown \(\+6\.7 points, ± 7\.2 over 3 seeds"),
        ([0.9, 0.6, 0.85], r"not shown \(\+1\.7 points, ± 39\.9 over 3 seeds"),
        ([0.8, 0.8, 0.8], r"not shown \(\+0\.0 points"),
    ],
)
def test_the_report_says_what_the_results_say(tmp_path: Path, rival: list[float], said: str) -> None:
    arms = {name: ARMS[name] for name in ("dense", "arank", "random")}
    sweep = parsed(tmp_path, arms=arms, base="runs/digits/model")
    accuracies = {"dense": [0.95, 0.97, 0.96], "arank": [0.8, 0.8, 0.8], "random": rival}
    written = report.write(sweep, write_results(tmp_path, accuracies), tmp_path)
    assert [path.name for path in written] == ["results.md", "accuracy.png", "skip.png"]
    assert all(path.stat().st_size > 500 for path in written)
    assert written[0].read_text().startswith("# digits made cheaper\n")
    text = written[0].read_text()
    assert re.search(said, text)
    dense = next(line for line in text.splitlines() if line.startswith("| dense |"))
    assert "| 96.0 ± 1.0 % |" in dense and "| 10.0 % |" in dense and "10 s = 1.00" in dense
    assert "| arank | 0.7 | 1 | 0.250 | 0.700 | 10.0 ± 0.0 % | 80.0 ± 0.0 % |" in text
    assert "| 50.0 ± 0.0 % | 0.690 (1 off target) |" in text and "7 s = 0.70" in text
    assert "| arank-0.7-0 | 1 | 0.50 | 87.5% |  |" in text


@pytest.mark.parametrize(
    ("rival", "said"),
    [
        (
            [2.5, 2.6, 2.55],
            r"ARank's choice loses less \(-0\.350 nats a token, ± 0\.124 over 3 seeds, ± 0\.000 over questions\)",
        ),
        ([1.9, 1.8, 1.85], r"ARank's choice loses more \(\+0\.350 nats a token"),
        ([2.25, 2.2, 2.25], r"not shown \(-0\.033 nats a token, ± 0\.072 over 3 seeds"),
    ],
)
def test_a_report_of_perplexities(tmp_path: Path, rival: list[float], said: str) -> None:
    arms = {name: ARMS[name] for name in ("dense", "arank", "random")}
    sweep = parsed(tmp_path, arms=arms, test={"metric": "perplexity"})
    losses = {"dense": [2.0, 2.01, 1.99], "arank": [2.2, 2.2, 2.2], "random": rival}
    (tmp_path / "test.jsonl").write_text('{"question": "Which?", "answer": "a"}\n')
    written = report.write(sweep, write_results(tmp_path, losses, told, 4.0), tmp_path)
    assert [path.name for path in written] == ["results.md", "perplexity.png", "skip.png"]
    text = written[0].read_text()
    assert re.search(said, text) and "| loss of | target | difference, nats a token |" in text
    assert "| before | after | by threshold |" in text and "ccuracy" not in text and "commonest" not in text
    dense = next(line for line in text.splitlines() if line.startswith("| dense |"))
    assert "| 54.60 | 7.39 ± 0.07 |" in dense, "mean and deviation of exp"
    assert "| 54.60 ± 0.00 | 9.03 ± 0.00 |" in text and "| 1.65 ± 0.00 | 0.690 (1 off target) |" in text
    assert "other pictures (each question is given the next picture): perplexity 20.29 ± 0.20. " in text


def pairs(losses: torch.Tensor, tokens: torch.Tensor) -> dict[int, list[tuple[Scores, Scores]]]:
    """One seed: a model that loses so much (N,) more than another at every answer of so many tokens (N,)."""
    ours, theirs = (Scores(each.tolist(), tokens.tolist()) for each in (losses + 3.0, torch.full_like(losses, 3.0)))
    return {0: [(ours, theirs)]}


def test_the_interval_over_answers_is_a_ratios() -> None:
    """Against the jackknife; nothing is left to chance where every token loses the same, however long the answers
    are."""
    tokens = torch.randint(1, 40, (300,), generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = compare(pairs(0.25 * tokens, tokens))
    assert exact.mean == pytest.approx(0.25) and exact.by_item == pytest.approx(0, abs=1e-12)
    losses = 0.25 * tokens + noise * tokens.sqrt()
    found = compare(pairs(losses, tokens))
    without = (losses.sum() - losses) / (tokens.sum() - tokens)
    jackknife = ((without - without.mean()).square().sum() * 299 / 300).sqrt()
    assert found.by_item == pytest.approx(1.968 * float(jackknife), rel=0.02)
    assert found.mean == pytest.approx(float(losses.sum() / tokens.sum())) and found.seeds == 1 and not found.shown
