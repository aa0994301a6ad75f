"""What a run reports: `metrics.jsonl`, TensorBoard, and a line on the screen."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from zoo.context import Trace
from zoo.files import atomic_write
from zoo.routing.statistics import ExpertLoad, RouterHits

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peak of one device, by a part of its name; model FLOPs utilisation is reported where it is known."""


class Metrics:
    """Writes one object a log step to `metrics.jsonl`, numbers unrounded, and every scalar to TensorBoard.

    Args:
        folder: the run folder.
        resumed_at: step of the checkpoint the run goes on from; what lies past it is cut off. None for a new run.
    """

    def __init__(self, folder: Path, resumed_at: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        if resumed_at is None:
            self.path.write_text("", encoding="utf-8")
        else:
            cut(self.path, resumed_at)
        self.file = self.path.open("a", encoding="utf-8")
        # readers drop events from this step on, whatever a killed run has left there
        purge = 0 if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the object of `step`."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.file.close()
        self.writer.close()


def read(path: Path) -> list[dict[str, Any]]:
    """The objects of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    objects = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects


def cut(path: Path, step: int) -> None:
    """Drop the lines past `step`; atomic."""
    kept = [item for item in read(path) if item["step"] <= step] if path.exists() else []
    atomic_write(path, "".join(json.dumps(item) + "\n" for item in kept))


def add_to(sums: dict[str, torch.Tensor], more: Mapping[str, torch.Tensor]) -> None:
    """Add up by name, over micro-batches."""
    for name, value in more.items():
        sums[name] = value.detach() if name not in sums else sums[name] + value.detach()


def trace_sums(trace: Trace) -> dict[str, torch.Tensor]:
    """What a forward's routers report, as sums: `router|…` hits and misses of all auxiliary routers together, and
    `expert|<block>|…` rows of each expert of every block whose tokens choose."""
    sums: dict[str, torch.Tensor] = {}
    for hits in trace.statistics.hits.values():
        named = zip(dataclasses.fields(hits), hits.numbers(), strict=True)
        add_to(sums, {f"router|{field.name}": torch.as_tensor(count) for field, count in named})
    for name, load in trace.statistics.expert_loads.items():
        add_to(sums, {f"expert|{name}|{expert}": torch.as_tensor(n) for expert, n in enumerate(load.rows)})
    return sums


def step_values(totals: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, float]:
    """What a log step says of losses and routers.

    Args:
        totals: sums over the whole step and all ranks: losses by modality, `loss`, and what `trace_sums` gave.
        counts: target tokens of each modality over the whole step.
    """
    values = {"loss": totals["loss"]} | {f"loss/{name}": totals[name] / n for name, n in counts.items() if n}
    if "z_loss" in totals:
        values["loss/z"] = totals["z_loss"] / max(sum(counts.values()), 1)
    if "auxiliary" in totals:
        values["auxiliary/loss"] = totals["auxiliary"]
        hits = {key.removeprefix("router|"): value for key, value in totals.items() if key.startswith("router|")}
        values |= {f"auxiliary/{key}": value for key, value in RouterHits(**hits).rates().items()} if hits else {}
    if "balance" in totals:
        values["balance/loss"] = totals["balance"]
    rows: dict[str, dict[int, float]] = {}
    for key, value in totals.items():
        if key.startswith("expert|"):
            _, block, expert = key.split("|")
            rows.setdefault(block, {})[int(expert)] = value
    for block, counts in rows.items():
        load = ExpertLoad(tuple(counts[expert] for expert in sorted(counts)))
        values |= {f"load/{block}/{key}": value for key, value in load.balance().items()}
    return values


class Progress:
    """A line on the screen every log step: losses by modality, tokens a second, time left."""

    def __init__(self, steps: int, first_step: int) -> None:
        self.steps, self.first = steps, first_step
        self.began = self.marked = time.monotonic()
        self.tokens = 0
        self.tokens_marked = 0

    def add(self, tokens: int) -> None:
        """Tokens (all ranks) of the step just done."""
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens a second since the last call."""
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


def peak_flops(device: torch.device, ranks: int) -> float | None:
    """Peak of all ranks' devices together in FLOPs a second, None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * ranks for part, peak in PEAK_FLOPS.items() if part in name), None)
