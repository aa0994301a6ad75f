"""Timing of several computations in turn, in one process, and the statistics of their ratios.

A ratio of two times means something only where both were taken under the same conditions. So the variants of a
benchmark run in rounds, one sample of each a round, in turning order; a round during which other processes used the
machine does not count if enough rounds are quiet; and the process's own CPU time, which others disturb less, gives a
second reading.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

FORWARD, BOTH, STEP = "forward", "forward_backward", "step"
SAMPLE_SECONDS = 0.12
"""A sample repeats its computation for at least so long."""
CLEAN_CORES = 0.2
"""In a clean round other processes used less than so many cores during each of the two samples compared."""
LEAST_ROUNDS = 3
"""With fewer clean rounds than these all rounds count, and the row says that the machine was busy."""

Task = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A computation, and what its backward pass differentiates."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    leaves: Sequence[Tensor]

    def forward(self) -> None:
        with torch.no_grad():
            self.run()

    def forward_backward(self) -> Task:
        """The task that computes the gradients of all leaves, from ones at every result; they are accumulated
        nowhere."""
        ones: list[Tensor] = []

        def task() -> None:
            results = self.run()
            results = results if isinstance(results, tuple) else (results,)
            if not ones:  # whole tensors, made once: kernels copy a gradient that is one number expanded
                ones.extend(torch.ones_like(y) for y in results)
            torch.autograd.grad(results, list(self.leaves), ones, allow_unused=True)

        return task


def both_modes(variants: Mapping[str, Variant]) -> dict[str, dict[str, Task]]:
    """{mode: {variant: task}} for the forward pass alone and with the backward pass."""
    return {
        FORWARD: {name: variant.forward for name, variant in variants.items()},
        BOTH: {name: variant.forward_backward() for name, variant in variants.items()},
    }


# ------------------------------------------------------------------------------------------------------------- samples


@dataclasses.dataclass(frozen=True)
class Sample:
    """Seconds a call took, by the clock and of this process's CPU time; and how many cores others used meanwhile."""

    wall: float
    cpu: float
    others: float | None
    """None: not known on this system."""

    @property
    def clean(self) -> bool:
        return self.others is None or self.others < CLEAN_CORES


def busy_seconds() -> float | None:
    """Core-seconds that this machine has been busy since it started, time taken by other virtual machines included."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def take(task: Task, calls: int, device: str = "cpu") -> Sample:
    """One sample: `calls` calls, by the device's own clock where it has one."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else []
    before, cpu, start = busy_seconds(), time.process_time(), time.perf_counter()
    if events:
        events[0].record()
    for _ in range(calls):
        task()
    if events:
        events[1].record()
        torch.cuda.synchronize()
    elapsed, own, after = time.perf_counter() - start, time.process_time() - cpu, busy_seconds()
    wall = events[0].elapsed_time(events[1]) / 1e3 if events else elapsed
    others = None if before is None or after is None else max(0.0, (after - before - own) / elapsed)
    return Sample(wall / calls, own / calls, others)


def warm_up(task: Task, device: str = "cpu") -> int:
    """Run a task until it is warm: twice at least. Returns how many calls make a sample."""
    take(task, 1, device)
    return max(1, math.ceil(SAMPLE_SECONDS / take(task, 1, device).wall))


def measure(
    tasks: Mapping[str, Task], rounds: int, seconds: float, device: str = "cpu", tick: Callable[[], None] = lambda: None
) -> dict[str, list[Sample]]:
    """Samples of every task, `rounds` of each, or fewer but at least three where they would take longer than `seconds`.

    Every other round runs backwards, so that none always follows the same one. `tick` is called once a round that was
    planned, done or not.
    """
    calls = {name: warm_up(task, device) for name, task in tasks.items()}
    samples: dict[str, list[Sample]] = {name: [] for name in tasks}
    start = time.perf_counter()
    for number in range(rounds):
        if number < LEAST_ROUNDS or time.perf_counter() - start < seconds:
            for name in list(tasks)[:: -1 if number % 2 else 1]:
                samples[name].append(take(tasks[name], calls[name], device))
        tick()
    return samples


# ---------------------------------------------------------------------------------------------------------- statistics


@dataclasses.dataclass(frozen=True)
class Reading:
    """What the rounds say of a pair."""

    ours_ms: float
    other_ms: float | None
    ratio: float
    spread: tuple[float, float]
    """Smallest and largest ratio of a round."""
    cpu_ratio: float
    """The ratio of CPU times, medians over all rounds."""
    rounds: int
    """Those that count."""
    busy: bool
    """Too few were clean: these are all of them."""


def read(ours: Sequence[Sample], other: Sequence[Sample] | None, ratio: Callable[[float, float], float]) -> Reading:
    """The ratio of two medians over the rounds that count.

    Args:
        ours, other: samples by round; `other` is None where ours are compared with a number.
        ratio: from the seconds of ours and of the other (0 where there is none).
    """
    pairs = list(zip(ours, other or [None] * len(ours), strict=True))
    clean = [pair for pair in pairs if all(sample is None or sample.clean for sample in pair)]
    used = clean if len(clean) >= min(LEAST_ROUNDS, len(pairs)) else pairs
    mine, theirs = _median(a.wall for a, _ in used), _median(b.wall for _, b in used if b is not None)
    each = [ratio(a.wall, b.wall if b is not None else 0.0) for a, b in used]
    return Reading(
        ours_ms=1e3 * mine,
        other_ms=None if other is None else 1e3 * theirs,
        ratio=ratio(mine, theirs),
        spread=(min(each), max(each)),
        cpu_ratio=ratio(_median(a.cpu for a, _ in pairs), _median(b.cpu for _, b in pairs if b is not None)),
        rounds=len(used),
        busy=used is pairs and len(clean) < len(pairs),
    )


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0
