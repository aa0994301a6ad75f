"""What was found, as tables on the screen, as JSON, and for TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from pretrain.report import print_table
from tools.evaluate.generation import Generation
from tools.evaluate.losses import Losses
from tools.evaluate.retrieval import Retrieval
from zoo.files import atomic_write


def print_losses(name: str, found: Losses, modalities: Sequence[str]) -> None:
    """A row for each modality, and one for the whole loss."""
    table = Table(title=f"{name}: {found.rows:,} of {found.rows_of:,} rows")
    both = "eval/topk/loss" in found.values and "eval/causal/loss" in found.values
    routing = "causal" if "eval/causal/loss" in found.values else "topk"
    heads = ["", routing, *(["topk", "causal − topk"] if both else []), "perplexity", "bits/byte", "best constant"]
    for head in heads:
        table.add_column(head, justify="left" if not head else "right")
    for label in ("", *(f"/{modality}" for modality in modalities)):
        if f"eval/{routing}/loss{label}" not in found.values:
            continue
        keys = [f"eval/{routing}/loss{label}"]
        keys += [f"eval/topk/loss{label}", f"eval/gap{label}"] if both else []
        if label:  # of the whole loss these say nothing
            keys += [f"eval/{routing}/perplexity{label}", f"eval/{routing}/bits_per_byte{label}"]
            keys.append(next((k for k in (f"eval/unigram{label}", f"eval/constant{label}") if k in found.values), ""))
        cells = [f"{found.values[key]:.4f}" if key in found.values else "" for key in keys]
        table.add_row(label.removeprefix("/") or "all", *cells)
    Console().print(table)
    if found.difference is not None:
        print(
            f"the run's own last evaluation (step {found.step:,}) says the same to within {found.difference:.1e}"
            if found.difference < 1e-6
            else f"the run's own last evaluation (step {found.step:,}) differs by up to {found.difference:.4g}: the "
            "data or the weights have changed since"
        )


def print_retrieval(name: str, found: Retrieval) -> None:
    rows = [
        ("caption after its item", f"{found.caption_nats:.3f} nats, {found.caption_perplexity:.3f} perplexity a token"),
        ("after another item", f"{found.caption_nats_after_another:.3f} nats"),
        ("with nothing before it", f"{found.caption_nats_alone:.3f} nats"),
        (f"{found.modality} → text, among {found.candidates}", str(found.item_to_text)),
        (f"text → {found.modality}, by the caption", str(found.text_to_item)),
    ]
    if found.text_to_item_by_item is not None:
        rows.append((f"text → {found.modality}, by the item", str(found.text_to_item_by_item)))
    print_table(f"{name}: {found.documents} documents", [*rows, ("chance", f"{1 / found.candidates:.1%}")])


def print_generation(name: str, found: Generation) -> None:
    rows = [
        (
            "distance to the nearest training item",
            f"{found.nearest_training:.3f} (held-out items {found.nearest_training_of_held_out:.3f})",
        ),
        ("nearer than any held-out item", str(found.nearer_than_any_held_out)),
    ]
    if found.as_asked is None:
        rows.append(("classifier", "none: too many labels for the training items; give --labels"))
    else:
        rows += [
            (f"seen as asked, of {found.labels} labels", str(found.as_asked)),
            ("the same for exchanged labels", f"{found.as_asked_shuffled:.1%}"),
            ("the classifier on held-out items", f"{found.classifier_on_held_out:.1%}"),
        ]
    if found.frechet is not None:
        rows += [
            ("Fréchet distance", f"{found.frechet:.4g} (training items {found.frechet_of_training:.4g})"),
            ("kernel distance", f"{found.kernel:.4g}"),
        ]
    print_table(f"{name}: {found.items} items of {found.modality} from captions", rows)


def print_tasks(found: Mapping[str, Mapping[str, float]]) -> None:
    for task, values in found.items():
        print_table(task, [(key, f"{value:.4f}") for key, value in values.items()])


def write(folder: Path, step: int, found: Mapping[str, Any]) -> Path:
    """`evaluation.json` with everything, and `tensorboard/` with every number at the run's step."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "evaluation.json"
    atomic_write(path, json.dumps(found, indent=1) + "\n")
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for name, value in numbers(found):
            writer.add_scalar(name, value, step)
    return path


def numbers(found: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested mappings, by the path of its keys."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{start}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{start}{key}", value
