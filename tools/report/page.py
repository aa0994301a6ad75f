"""The page about a run: what it learned over time, what it makes, and where tokens go in it."""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pretrain import metrics, report
from tools.describe.tree import count
from tools.generate import as_shown, write_parts
from tools.pages import environment
from tools.report.drawing import TEMPLATES, draw, style_and_script
from tools.report.routing import group_of, layer_of, look
from tools.report.usage import maps, word_table
from tools.sweep.pretrain import figures
from tools.sweep.pretrain.study import of_runs
from tools.sweep.pretrain.tables import Table, tables
from zoo.context import CAUSAL, TOPK
from zoo.files import atomic_write
from zoo.generate import Part
from zoo.run import Run

FIGURES, SAMPLES = "figures", "samples"
STUDIED = ("Routers", "Cost")
"""Tables of a comparison that say something of a single run."""
COUNTED = 64
"""Documents that words and patches of experts are counted over, at most."""


@dataclasses.dataclass(frozen=True)
class Content:
    """What the page is made of beside the run."""

    documents: Sequence[Sequence[Part]]
    """Those that routing is shown of, the first `shown` of them in full."""
    origin: str
    """Where the documents are from, in words."""
    shown: int
    samples: int
    """Samples of each modality."""
    options: Mapping[str, Any]
    """How samples are chosen."""


def write(run: Run, content: Content, path: Path) -> Path:
    """The page, and figures and samples in the run's `report/`.

    Raises:
        UserError: the run has no causal mode.
    """
    folder = report.folder_of(run.folder)
    step = max((item["step"] for item in metrics.read(run.folder / "metrics.jsonl")), default=0)
    keep_samples(run, content, folder / SAMPLES / f"step-{step}")
    study = of_runs([run.folder], None)
    drawn = _own_figures(run, folder / FIGURES) | figures.draw(study, folder / FIGURES)
    routed = [look(run, parts) for parts in content.documents[:COUNTED]]
    style, script = style_and_script()
    page = (
        environment(TEMPLATES)
        .get_template("run.html")
        .render(
            title=run.folder.resolve().name,
            facts=facts(run, step),
            pictures={title: base64.b64encode(each.read_bytes()).decode() for title, each in drawn.items()},
            tables=[
                *_losses(run),
                *(each for each in tables(study) if each.heading in STUDIED),
                *_foresight(run.folder),
            ],
            samples=samples(run, folder / SAMPLES),
            documents=[draw(run, each) for each in routed[: content.shown]],
            looked_ahead=[draw(run, look(run, parts, TOPK)) for parts in content.documents[: content.shown]],
            origin=content.origin,
            words=word_table(run, routed),
            maps=maps(run, routed),
            style=style,
            script=script,
        )
    )
    atomic_write(path, page)
    return path


def facts(run: Run, step: int) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    last = report.last_step(run.folder)
    total = sum(parameter.numel() for parameter in run.model.parameters())
    found = [
        ("parameters", f"{total:,}"),
        ("layers", f"{len(run.model.layers)}"),
        ("modalities", ", ".join(run.modalities)),
        ("context", f"{run.length:,} tokens"),
        ("steps", f"{step:,}"),
    ]
    if "tokens" in last:
        found.append(("tokens", f"{last['tokens']:,}"))
    if "flops" in last:
        found.append(("training FLOPs", count(last["flops"])))
    if "seconds" in last:
        found.append(("seconds of steps", f"{last['seconds']:,.0f}"))
    return found


def keep_samples(run: Run, content: Content, folder: Path) -> None:
    """Let the run make items of each modality from nothing, and keep them as files: `MODALITY-NNN-0.suffix`."""
    for name in run.modalities:
        rows = run.generate_all([[]] * content.samples, name, progress=True, **content.options)
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_parts(run, rows, folder / name)


def samples(run: Run, folder: Path) -> list[tuple[int, list[tuple[str, list[str]]]]]:
    """Step → modality → what was made then, as HTML; all that reports of this run have kept."""
    found = []
    for kept in sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-"))):
        by_name = [
            (name, [as_shown(each.read_bytes(), modality.config.suffix) for each in sorted((kept / name).glob("*"))])
            for name, modality in run.modalities.items()
        ]
        found.append((int(kept.name.removeprefix("step-")), by_name))
    return found


def _own_figures(run: Run, folder: Path) -> dict[str, Path]:
    """Losses by modality, training and validation, and how well auxiliary routers foresee, over tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [item for item in metrics.read(run.folder / "metrics.jsonl") if "tokens" in item]
    losses = {f"{name}, training": f"loss/{name}" for name in run.modalities}
    for routing, words in ((CAUSAL, "causal"), (TOPK, "top-k")):
        losses |= {f"{name}, {words}": f"eval/{routing}/loss/{name}" for name in run.modalities}
    routers = {"as top-k decides": "auxiliary/accuracy", "always no": "auxiliary/always_skip"}
    found = {}
    for title, keys, label in (
        ("Losses by modality", losses, "nats a token"),
        ("Auxiliary routers in training", routers, "share of decisions"),
    ):
        drawn = {words: [(item["tokens"], item[key]) for item in lines if key in item] for words, key in keys.items()}
        if any(drawn.values()):
            found[title] = _line_figure(drawn, label, folder / f"{title.lower().replace(' ', '-')}.svg")
    return found


def _line_figure(drawn: Mapping[str, Sequence[tuple[float, float]]], label: str, path: Path) -> Path:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    colours: dict[str, str] = {}
    for words, points in drawn.items():
        what, _, kind = words.partition(", ")
        colour = colours.setdefault(what, f"C{len(colours)}")
        style = {"causal": "o-", "top-k": "x--"}.get(kind, "-")
        if points:
            axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=1.2, markersize=5, label=words)
    axes.set(xlabel="tokens", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    return path


def _losses(run: Run) -> list[Table]:
    """The last evaluation by modality; nothing where there was none."""
    values, rows = report.last_evaluation(run.folder), []
    for label in ("", *(f"/{name}" for name in run.modalities)):
        causal, topk = (values.get(f"eval/{routing}/loss{label}") for routing in (CAUSAL, TOPK))
        cells = [causal, topk, None if causal is None or topk is None else causal - topk]
        cells.append(values.get(f"eval/unigram{label}", values.get(f"eval/constant{label}")) if label else None)
        if causal is not None or topk is not None:
            rows.append([label[1:] or "all", *("" if cell is None else f"{cell:.4f}" for cell in cells)])
    text = (
        "The last evaluation, in nats a token. Top-k routing, as in training, looks at later tokens; causal routing is "
        "what generation has. The best constant guess is what any model must beat."
    )
    heads = ["loss of", "causal", "top-k", "causal − top-k", "best constant"]
    return [Table("Losses at the end", text, heads, rows)] if rows else []


def _foresight(run: Path) -> list[Table]:
    """How well each auxiliary router foresees what top-k chooses; nothing where there is none."""
    values = report.last_evaluation(run)
    rows = []
    for key in values:
        if match := re.fullmatch(r"eval/auxiliary/(.+)/accuracy", key):
            rates = [
                values[f"eval/auxiliary/{match[1]}/{k}"] for k in ("accuracy", "precision", "recall", "always_skip")
            ]
            rows.append([f"{layer_of(match[1])}", group_of(match[1]), *(f"{rate:.1%}" for rate in rates)])
    text = (
        "Auxiliary routers stand in for top-k where later tokens are not known: how many of their decisions are those "
        "of top-k, how many that they let pass it takes, how many that it takes they let pass, and how many would be "
        "right by always saying no."
    )
    heads = ["layer", "part", "accuracy", "precision", "recall", "always no"]
    return [Table("Auxiliary routers", text, heads, rows)] if rows else []
