"""The mixture of a recipe's data, as a table: documents, tokens by modality, shares, epochs over the run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.data import Data, open_data
from pretrain.recipe import Recipe


def data_facts(recipe: Recipe) -> dict[str, Any]:
    """Figures of each source; opens the data, which tokenises them where that has not been done."""
    data = open_data(recipe.data, recipe.modalities, recipe.seed)
    rows = recipe.train.steps * recipe.train.global_batch
    return {"rows": rows, "sources": _sources(data, rows), "skipped": len(data.skipped)}


def _sources(data: Data, rows: int) -> dict[str, dict[str, Any]]:
    held_out = {} if data.validation is None else data.validation.streams
    epochs = data.train.epochs(rows)
    return {
        name: {
            "documents": len(stream.documents),
            "tokens": dict(stream.documents.counts),
            "rows": stream.rows_per_epoch,
            "padding": stream.share_of_padding,
            "share": data.train.shares[name],
            "epochs": epochs[name],
            "held_out": len(held_out[name].documents) if name in held_out else 0,
        }
        for name, stream in data.train.streams.items()
    }


def show_data(facts: dict[str, Any]) -> None:
    """Print the table."""
    modalities = list(next(iter(facts["sources"].values()))["tokens"])
    columns = (
        "documents",
        *(f"{name} tokens" for name in modalities),
        "rows",
        "padding",
        "share",
        "epochs",
        "held out",
    )
    table = Table("source", *columns, title=f"{facts['rows']:,} rows over the run")
    for name, source in facts["sources"].items():
        tokens = [f"{source['tokens'][modality]:,}" for modality in modalities]
        shares = [f"{source['padding']:.1%}", f"{source['share']:.2%}", f"{source['epochs']:.3g}"]
        table.add_row(
            name, f"{source['documents']:,}", *tokens, f"{source['rows']:,}", *shares, f"{source['held_out']:,}"
        )
    Console().print(table)
