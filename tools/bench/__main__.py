"""Measure the zoo's speed side by side with what it is compared with.

    python -m tools.bench [NAME ...] [--json FILE] [--page docs/benchmarks.md]

NAME is the beginning of a benchmark's name (see --list); without one all that this device has are measured. A ratio is
between two computations timed in turn in this process; figures of different rows are not for comparing.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.profiler import ProfilerActivity, profile

# the benchmarks register themselves
from tools.bench import (  # noqa: F401
    adapted,
    cuda,
    data,
    depth,
    documents,
    experts,
    generating,
    kernels,
    models,
    recurrent,
    report,
    repositories,
)
from tools.bench.benchmark import Benchmark, Group, Settings, TableRow, Unavailable, known, select
from tools.bench.measure import measure
from zoo.config import UserError, suggestion

SECONDS = 40.0
"""A mode of a benchmark gets no further round after so long, but three in any case."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if options.list:
            for found in known():
                console.print(f"[bold]{found.name}[/bold] ({found.device}): {found.about}", highlight=False)
            return 0
        if options.read:
            facts, rows, skipped = report.read_json(options.read)
        else:
            _check_device(options.device)
            if options.data is not None and not options.data.is_dir():
                raise UserError(f"--data {options.data}: is not a folder; give one of tar shards, see docs/data.md")
            if options.threads:
                torch.set_num_threads(options.threads)
            settings = Settings(options.device, options.quick, dict(map(_peer, options.peer)), options.data)
            rows, skipped = run(
                select(options.names, options.device), settings, options.rounds, options.profile, console
            )
            facts = report.conditions(options.device, options.quick, options.rounds)
        report.show(facts, rows, skipped, console)
        if options.json:
            report.write_json(options.json, facts, rows, skipped)
        if options.page:
            report.write_page(options.page, facts, rows, skipped)
        if not rows:
            raise UserError("nothing was measured, see above")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=[], metavar="NAME", help="beginning of a benchmark's name")
    parser.add_argument("--list", action="store_true", help="name all benchmarks and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="samples of each computation, at most (default 9)")
    parser.add_argument("--threads", type=int, help="of PyTorch and the kernels; default PyTorch's choice")
    parser.add_argument("--quick", action="store_true", help="small shapes: to see that it runs, not for figures")
    parser.add_argument("--profile", action="store_true", help="print where each computation's CPU time goes, too")
    kinds = "; ".join(f"{kind}: {place}" for kind, place in repositories.KINDS.items())
    parser.add_argument("--peer", action="append", default=[], metavar="KIND=FOLDER", help=f"a checkout. {kinds}")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="shards with texts and pictures, for data.real")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--read", type=Path, metavar="FILE", help="take the rows of an earlier --json, measure nothing")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables between the page's markers")
    options = parser.parse_intermixed_args(arguments)
    for name in ("rounds", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)}; it must be at least 1")
    return options


def _check_device(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is none here; python -m tools.doctor says why")


def _peer(text: str) -> tuple[str, Path]:
    kind, separator, folder = text.partition("=")
    if not separator or kind not in repositories.KINDS:
        close = suggestion(kind, repositories.KINDS)
        raise UserError(f"--peer {text}: write KIND=FOLDER; kinds: {', '.join(repositories.KINDS)}{close}")
    if not Path(folder).is_dir():
        raise UserError(f"--peer {text}: {folder} is not a folder; give a checkout of {repositories.KINDS[kind]}")
    return kind, Path(folder)


def run(
    benchmarks: Sequence[Benchmark], settings: Settings, rounds: int, profiled: bool, console: Console
) -> tuple[list[TableRow], dict[str, str]]:
    """Measure; returns the rows, and why a benchmark was left out, by name. Ctrl-C ends it with the rows so far."""
    rows: list[TableRow] = []
    skipped: dict[str, str] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(benchmarks) * 2 * rounds)
        for number, found in enumerate(benchmarks):
            progress.update(bar, description=found.name)
            try:
                rows += _measure(found, settings, rounds, profiled, console, lambda: progress.advance(bar))
            except KeyboardInterrupt:
                skipped |= {later.name: "interrupted" for later in benchmarks[number:]}
                break
            except Unavailable as error:
                skipped[found.name] = str(error)
            progress.update(bar, completed=(number + 1) * 2 * rounds)
            gc.collect()
    return rows, skipped


def _measure(
    found: Benchmark, settings: Settings, rounds: int, profiled: bool, console: Console, tick: Callable[[], None]
) -> list[TableRow]:
    """All rows of one benchmark."""
    torch.manual_seed(0)
    group = found.build(settings)
    rows = group.named_figures(found.name)
    for mode, tasks in group.tasks.items():
        rows += group.rows(found.name, mode, measure(tasks, rounds, SECONDS, settings.device, tick))
    if profiled:
        _profile(found.name, group, settings.device, console)
    return rows


def _profile(name: str, group: Group, device: str, console: Console) -> None:
    """The operators that each task spends its own time in, one call after those that were measured."""
    gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    order = "self_device_time_total" if gpu else "self_cpu_time_total"
    for mode, tasks in group.tasks.items():
        for variant, task in tasks.items():
            with profile(activities=activities) as found:
                task()
            console.rule(f"{name}, {mode}: {variant}")
            table = found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=50)
            console.print(table, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
