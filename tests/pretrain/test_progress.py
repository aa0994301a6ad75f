"""The line on the screen, and what the hardware could do."""

from __future__ import annotations

import time

import torch

from pretrain.progress import Progress, duration, peak_flops


def test_progress() -> None:
    progress = Progress(100, 40)
    progress.began = progress.marked = time.monotonic() - 10
    progress.add(500)
    rate = progress.rate()
    assert 45 < rate <= 50
    line = progress.line(60, {"loss": 2.5, "loss/image": 3.25, "tokens_per_second": 1234.5}, ("text", "image"))
    assert line == "step  60/100  loss 2.500  image 3.250  1,234 tokens/s  0:20 left"
    assert duration(3723) == "1:02:03" and duration(59.9) == "0:59"


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_flops(torch.device("cpu"), 2) is None
