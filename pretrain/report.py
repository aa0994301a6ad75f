"""What a run leaves for people: the loss curves as a picture, a summary as JSON and as a table on the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain import metrics, recipe_file, run_folder


def folder_of(run: Path) -> Path:
    """`report/` of a run folder, made where absent."""
    folder = run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def draw_losses(run: Path) -> Path:
    """`report/loss.png`: training loss of each modality over tokens, with the causal validation loss as points."""
    figure, axes = _figure((7, 4))
    objects = metrics.read(run / "metrics.jsonl")
    modalities = recipe_file.read(run / run_folder.RECIPE)["modalities"]
    names = [key for key in (f"loss/{name}" for name in sorted(modalities)) if any(key in item for item in objects)]
    for color, name in enumerate(names):
        label = name.removeprefix("loss/")
        points = [(item["tokens"], item[name]) for item in objects if name in item]
        axes.plot(*zip(*points, strict=True), color=f"C{color}", linewidth=1, label=f"{label}, training")
        key = f"eval/causal/{name}"
        evaluated = [(item["tokens"], item[key]) for item in objects if key in item and "tokens" in item]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o", color=f"C{color}", label=f"{label}, validation (causal)")
    axes.set(xlabel="tokens", ylabel="nats per token", title=run.name)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, folder_of(run) / "loss.png")


def draw_images(rows: Mapping[str, Sequence[Any]], path: Path, title: str) -> Path:
    """A grid of grey images (H, W), one labelled row a key."""
    import numpy as np

    width = max(len(images) for images in rows.values())
    figure, axes = _figure((0.55 * width + 0.8, 0.62 * len(rows) + 0.6), len(rows), width)
    for line, (label, images) in zip(np.atleast_2d(axes), rows.items(), strict=True):
        for cell in line:
            cell.axis("off")
        for cell, image in zip(line, images, strict=False):
            cell.imshow(image, cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
        line[0].text(-0.35, 0.5, label, transform=line[0].transAxes, ha="right", va="center")
    figure.suptitle(title)
    return _save(figure, path)


def write_summary(run: Path, summary: Mapping[str, Any]) -> Path:
    """Write the summary of a run to `report/summary.json`."""
    path = folder_of(run) / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns on the screen."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def last_evaluation(run: Path) -> dict[str, float]:
    """The newest `eval/…` values of a run; empty where it was never evaluated."""
    found = [item for item in metrics.read(run / "metrics.jsonl") if any(key.startswith("eval/") for key in item)]
    return found[-1] if found else {}


def last_step(run: Path) -> dict[str, float]:
    """The newest training step that was logged; empty where there is none."""
    found = [item for item in metrics.read(run / "metrics.jsonl") if "tokens_per_second" in item]
    return found[-1] if found else {}


def _figure(size: tuple[float, float], *grid: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(*grid, figsize=size, layout=None if grid else "constrained")


def _save(figure: Any, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path
