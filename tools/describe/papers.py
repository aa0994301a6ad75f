"""The table of several recipes' parameters and FLOPs beside what the papers print, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field

from zoo.config import Config, UserError, suggestion

UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}


class Printed(Config):
    """What a paper prints for a recipe's size."""

    printed: str | None = Field(None, pattern=r"^\d+(\.\d+)?[TBMk]$")
    """As the paper has it, "443M"; None where it prints none."""
    counts: Literal["total", "active"] = "total"
    """Which of the recipe's parameters the label counts."""
    source: str
    """Where it stands; or whose size it is."""


class Papers(Config):
    """A file for `--papers`: the page's words, and what papers print, in the order of the table."""

    title: str
    notes: str
    recipes: dict[str, Printed]
    """By name of the recipe."""

    @classmethod
    def read(cls, path: str | None) -> Self | None:
        """The file at `path`; None for None.

        Raises:
            UserError: it cannot be read, or a key is wrong.
        """
        if path is None:
            return None
        try:
            return cls.parse(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"--papers: {path!r} cannot be read ({error}); give a YAML file") from None


def table(every: Sequence[Mapping[str, Any]], known: Papers | None) -> str:
    """Markdown of the facts of several recipes, beside what papers print.

    Raises:
        UserError: the papers' file names a recipe that is not here.
    """
    facts = {entry["name"]: entry for entry in every}
    printed = known.recipes if known else {}
    for name in printed:
        if name not in facts:
            raise UserError(
                f"recipes.{name}: no recipe of this name; known: {', '.join(facts)}{suggestion(name, facts)}"
            )
    lines = [f"# {known.title}", "", known.notes.strip(), ""] if known else []
    lines += [
        "| recipe | layers × width | parameters | active | GFLOPs a token | printed | deviation | source |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name in [*printed, *(name for name in facts if name not in printed)]:
        entry, paper = facts[name], printed.get(name)
        parameters, label = entry["parameters"], paper.printed if paper else None
        deviation = parameters[paper.counts] / number(label) - 1 if paper and label else None
        cells = [
            name,
            f"{entry['layers']} × {entry['d_model']}",
            f"{parameters['total'] / 1e6:,.1f}M",
            f"{parameters['active'] / 1e6:,.1f}M",
            " / ".join(f"{value / 1e9:.4g}" for value in sorted(set(entry["flops_per_token"].values()))),
            f"{label} {paper.counts}" if paper and label else "–",
            "–" if deviation is None else f"{deviation:+.1%}",
            paper.source if paper else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(label: str) -> float:
    """1.4e9 for "1.4B"."""
    return float(label[:-1]) * UNITS[label[-1]]
