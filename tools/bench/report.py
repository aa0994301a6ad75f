"""Where rows go: a table on the screen, a JSON file, the tables of a documentation page."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.bench.benchmark import LOWER, TableRow, known
from zoo.config import UserError
from zoo.kernels import compiled

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
PACKAGES = ("torch", "transformers", "mamba-ssm", "causal-conv1d")
BUSY = "† Other processes used the machine in most rounds: read the ratio of CPU times, or measure again."
MODES = {"forward": "F", "forward_backward": "F+B", "step": "step"}


def conditions(device: str, quick: bool, rounds: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    machine = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "compiler": compiled.compiler(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    }
    if device == "cuda":
        facts = torch.cuda.get_device_properties(0)
        machine["device"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.date.today().isoformat()
    return {"machine": machine, "versions": versions, "date": today, "quick": quick, "rounds": rounds}


def _processor() -> str:
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def write_json(file: Path, facts: Mapping[str, Any], rows: Sequence[TableRow], skipped: Mapping[str, str]) -> None:
    file.write_text(
        json.dumps({**facts, "skipped": dict(skipped), "rows": [row.to_dict() for row in rows]}, indent=1) + "\n"
    )


def read_json(file: Path) -> tuple[dict[str, Any], list[TableRow], dict[str, str]]:
    """What `write_json` wrote.

    Raises:
        UserError: the file is missing, or no such file.
    """
    try:
        facts = json.loads(file.read_text())
        rows = [TableRow.from_dict(values) for values in facts.pop("rows")]
        return facts, rows, facts.pop("skipped")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; give a file that --json wrote") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a file that --json wrote ({error!r})") from None


# ------------------------------------------------------------------------------------------------------------- figures

HEADINGS = ("", "pass", "ours ms", "other ms", "ratio", "of rounds", "of CPU", "goal", "aim")


def cells(row: TableRow) -> tuple[str, ...]:
    """A row as text, under `HEADINGS`; goals say which way is better."""
    sign = "≤" if row.better == LOWER else "≥"
    spread = "" if row.spread is None else "–".join(map(_figure, row.spread))
    goals = [
        "" if goal is None else f"{sign} {goal:g} {'✓' if row.reaches(goal) else '✗'}" for goal in (row.target, row.aim)
    ]
    return (
        row.name.partition(": ")[2],
        MODES.get(row.mode, row.mode),
        _ms(row.ours_ms),
        _ms(row.other_ms),
        _figure(row.ratio) + "†" * row.busy,
        spread,
        _figure(row.cpu_ratio),
        *goals,
    )


def by_benchmark(rows: Sequence[TableRow]) -> dict[str, list[TableRow]]:
    groups: dict[str, list[TableRow]] = {}
    for row in rows:
        groups.setdefault(row.name.partition(": ")[0], []).append(row)
    return groups


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2e}" if 0 < value < 1e-3 else f"{value:.0f}×" if value >= 100 else f"{value:.2f}"


def show(facts: Mapping[str, Any], rows: Sequence[TableRow], skipped: Mapping[str, str], console: Console) -> None:
    for name, members in by_benchmark(rows).items():
        table = Table(title=name, title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, no_wrap=heading != "")
        for row in members:
            color = "" if row.met is None else "green" if row.met else "red"
            table.add_row(*map(escape, cells(row)), style=color)
        console.print(table)
    console.print(escape(sentence(facts)))
    if any(row.busy for row in rows):
        console.print(BUSY)
    for name, reason in skipped.items():
        console.print(f"[yellow]left out[/yellow] {name}: {escape(reason)}")


def sentence(facts: Mapping[str, Any]) -> str:
    """The conditions in words."""
    machine, versions = facts["machine"], facts["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    return (
        f"{device}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{machine['instructions']}, OMP_WAIT_POLICY {machine['omp_wait_policy']}; {packages}; {facts['date']}."
    )


# ---------------------------------------------------------------------------------------------------------------- page


def write_page(file: Path, facts: Mapping[str, Any], rows: Sequence[TableRow], skipped: Mapping[str, str]) -> None:
    """Replace what stands between the page's two markers by the tables of these rows.

    Raises:
        UserError: the page is missing or has no markers; or the rows are those of shrunken shapes.
    """
    if facts["quick"]:
        raise UserError(f"{file}: rows of --quick are not figures for a page; measure without it")
    try:
        text = file.read_text()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{file}: it must have one line {BEGIN} and, below it, one line {END}")
    before, _, rest = text.partition(BEGIN)
    file.write_text(before + "\n".join((BEGIN, "", *_tables(facts, rows, skipped), "", END)) + rest.partition(END)[2])


def _tables(facts: Mapping[str, Any], rows: Sequence[TableRow], skipped: Mapping[str, str]) -> list[str]:
    """One table a benchmark under its description, in Markdown."""
    about = {found.name: found.about for found in known()}
    lines = [f"{sentence(facts)} At most {facts['rounds']} rounds."]
    if any(row.busy for row in rows):
        lines += ["", BUSY]
    for name, members in by_benchmark(rows).items():
        lines += ["", f"**`{name}`** {about.get(name, '')}", ""]
        lines += ["| " + " | ".join(HEADINGS) + " |", "|" + " --- |" * len(HEADINGS)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in members]
        notes = dict.fromkeys(f"{row.name.partition(': ')[2]}: {row.note}" for row in members if row.note)
        lines += ["", *(f"- {note}" for note in notes)] if notes else []
    if skipped:
        lines += ["", "Not measured:", "", *(f"- `{name}`: {reason}" for name, reason in skipped.items())]
    return lines
