"""How fast a run goes: tokens a second, time left, share of the hardware's peak."""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping

import torch

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peak of one device, by a part of its name; model FLOPs utilisation is reported where it is known."""


class Progress:
    """A line on the screen every log step: losses by modality, tokens a second, time left."""

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps, self.first = steps, first_step
        self.began = self.marked = time.monotonic()
        self.tokens = 0
        self.tokens_marked = 0

    def add(self, tokens: int) -> None:
        """Note the tokens (all ranks) of the step just done."""
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens a second since the last call, or the beginning."""
        now = time.monotonic()
        rate = (self.tokens - self.tokens_marked) / max(now - self.marked, 1e-9)
        self.marked, self.tokens_marked = now, self.tokens
        return rate

    def line(self, step: int, values: Mapping[str, float], modalities: tuple[str, ...]) -> str:
        """`values` as `Metrics.log` gets them, after `step` steps."""
        done = max(step - self.first, 1)
        left = (time.monotonic() - self.began) / done * (self.steps - step)
        losses = "  ".join(f"{name} {values[f'loss/{name}']:.3f}" for name in modalities if f"loss/{name}" in values)
        return (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {values['loss']:.3f}  {losses}  "
            f"{values['tokens_per_second']:,.0f} tokens/s  {duration(left)} left"
        )


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank has held at most: tensors on an accelerator, else the memory of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device, ranks: int) -> float | None:
    """Peak of all ranks' devices together in FLOPs a second, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * ranks for part, peak in PEAK_FLOPS.items() if part in name), None)
