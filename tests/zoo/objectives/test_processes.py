"""Processes by their ends, their inverses, and the times that they draw."""

from __future__ import annotations

import math

import pytest
import torch

from zoo.objectives.processes import Diffusion, Process, RectifiedFlow

PROCESSES: dict[str, Process] = {
    "diffusion": Diffusion(),
    "diffusion at any time": Diffusion(None),
    "flow": RectifiedFlow(),
    "shifted uniform flow": RectifiedFlow("uniform", 3.0),
}
data, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def at(time: float) -> torch.Tensor:
    return torch.tensor(time, dtype=torch.float64)


def times(process: Process, limit: float = 1.0, count: int = 100_000) -> torch.Tensor:
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return process.time(share, torch.tensor(limit, dtype=torch.float64))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_time_0_is_data_and_time_1_is_noise(process):
    torch.testing.assert_close(process.mix(data, noise, at(0.0)), data)
    torch.testing.assert_close(process.mix(data, noise, at(1.0)), noise)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_right_prediction_gives_data_and_noise_back(process):
    for time in (0.0, 0.1, 0.5, 0.9, 0.999):
        mixture = process.mix(data, noise, at(time))
        split = process.split(mixture, process.target(data, noise), at(time))
        torch.testing.assert_close((split.data, split.noise), (data, noise), rtol=1e-9, atol=1e-9)


def test_what_is_predicted():
    """The sign of the velocity: from data towards noise, as time runs."""
    flow, step = RectifiedFlow(), 1e-3
    moved = flow.mix(data, noise, at(0.4 + step)) - flow.mix(data, noise, at(0.4))
    torch.testing.assert_close(moved / step, flow.target(data, noise))
    assert torch.equal(Diffusion().target(data, noise), noise)


def test_the_cosine_schedule():
    """√ᾱ = cos(πt/2), and the variance of the mixture stays that of noise (Transfusion §2.2)."""
    for time in torch.linspace(0, 1, 7, dtype=torch.float64):
        scales = Diffusion().scales(time)
        assert float(scales.data) == pytest.approx(math.cos(float(time) * math.pi / 2), abs=1e-15)
        assert float(scales.data**2 + scales.noise**2) == pytest.approx(1)


def test_times_of_diffusion_are_the_thousand_steps():
    drawn, counts = times(Diffusion()).unique(return_counts=True)
    torch.testing.assert_close(drawn, torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert set(counts.tolist()) == {100}
    limited = times(Diffusion(), 0.5).unique()
    torch.testing.assert_close(limited, torch.arange(1, 501, dtype=torch.float64) / 1000)
    assert len(times(Diffusion(None)).unique()) == 100_000


def test_times_of_flow():
    logit = times(RectifiedFlow()).logit()
    assert (float(logit.mean()), float(logit.std())) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert float(times(RectifiedFlow(), 0.5).max()) == pytest.approx(0.5, abs=0.02)
    uniform = times(RectifiedFlow("uniform"))
    torch.testing.assert_close(times(RectifiedFlow("uniform", 3.0)), 3 * uniform / (1 + 2 * uniform))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_the_best_constant_guess(process):
    drawn = torch.randn(2, 200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = process.target(0.5 * drawn[0] + 3, drawn[1])
    assert float(target.var()) == pytest.approx(process.constant_loss(0.25), rel=0.02)
