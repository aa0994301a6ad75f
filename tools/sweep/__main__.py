"""Run what a sweep's file says, many runs that differ in few things, and write one report of them.

    python -m tools.sweep SWEEP.yaml [OUT] [key.sub=value ...]

OUT is a folder, by default runs/SWEEP. The same command goes on where it stopped; finished runs are never repeated, a
failed one is tried once more. With --rows FOLDER a small file of each finished run is kept there, and taken for the run
where OUT does not have it: so a sweep goes on on another machine. The key `type` of the file says of which kind the
sweep is:

    pretrain  Pretrain arms × sizes × seeds over one recipe, arms that match in FLOPs, active or total parameters as the
            file says, and say what each saves of the baseline's training. The table of costs is printed first. OUT gets
            `runs/<arm>-<size>-<seed>/` with run folders in it, `report.html`, `report.md`, `figures/` and `hparams/`.
    adapt   Adapt one dense multimodal LLM in many ways of equal decoder FLOPs, tune all alike, and compare how well
            they answer. OUT gets `arank.json`, `runs/<arm>-<target>-<seed>/result.json`, `timing.json`, `results.md`,
            `accuracy.png` or, where that is the metric, `perplexity.png`, and `skip.png`.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.sweep import keep, launch
from tools.sweep.folder import RESULT, check_folder, planned, prepare
from tools.sweep.kind import Sweep
from tools.sweep.kinds import open_sweep
from tools.sweep.slurm import write_script
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="YAML file")
    parser.add_argument("rest", nargs="*", default=[], metavar="OUT or key.sub=value")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs side by side; default: the file's")
    parser.add_argument("--rows", type=Path, metavar="FOLDER", help="small files of finished runs: read, and added to")
    by_hand = parser.add_mutually_exclusive_group()
    by_hand.add_argument("--print", action="store_true", help="only print the commands of the runs that are left")
    by_hand.add_argument("--slurm", action="store_true", help="only write OUT/sweep.sbatch, an array of those runs")
    by_hand.add_argument("--report", action="store_true", help="only write the report of what has been run")
    parser.add_argument("--no-timing", action="store_true", help="leave out what is timed once all runs are done")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        overrides = [word for word in options.rest if "=" in word]
        folders = [Path(word) for word in options.rest if "=" not in word]
        if len(folders) > 1:
            raise UserError(f"{folders[1]}: one folder is enough, and {folders[0]} is given already; remove one")
        out = folders[0] if folders else Path("runs") / options.sweep.stem
        sweep = open_sweep(options.sweep, overrides)
        if options.jobs is not None and options.jobs < 1:
            raise UserError(f"--jobs: {options.jobs}; at least one run must go on")
        if options.print or options.slurm:
            return by_other_hands(sweep, out, options.slurm, options.jobs or sweep.jobs, options.rows)
        return run(sweep, out, options.report, options.no_timing, options.jobs, options.rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def run(
    sweep: Sweep[Any],
    out: Path,
    only_report: bool = False,
    no_timing: bool = False,
    jobs: int | None = None,
    rows: Path | None = None,
) -> int:
    """Everything that is not done yet; returns the exit code, 1 where a run failed.

    Args:
        jobs: runs side by side; default: as the sweep says.
        rows: folder of kept runs, see `tools.sweep.keep`.
    Raises:
        UserError: a mistake of the user's; it is found before any run is launched.
    """
    points, left = _prepared(sweep, out, rows)
    failed = []
    if not only_report:
        failed = launch.launch(sweep, left, jobs or sweep.jobs, lambda folder: _keep(sweep, folder, rows))
        if not no_timing and not failed:
            sweep.measure(points, out)
    written = sweep.report(points, out)
    print(f"{', '.join(path.name for path in written)} are in {out}")
    return 1 if failed else 0


def by_other_hands(sweep: Sweep[Any], out: Path, slurm: bool, jobs: int, rows: Path | None = None) -> int:
    """Print the commands of the runs that are left, or write them as an array script of Slurm; returns the exit code.

    Raises:
        UserError: as `run`.
    """
    _, left = _prepared(sweep, out, rows)
    if not slurm:
        print(*(shlex.join(launch.command(sweep, folder)) for folder in left), sep="\n")
    elif left:
        path = write_script(sweep, left, out, jobs)
        print(f"{len(left)} runs: sbatch {path}\nthen, for the report: the same command with --report")
    else:
        print("every run is finished; --report writes the report")
    return 0


def _keep(sweep: Sweep[Any], folder: Path, rows: Path | None) -> None:
    if rows is not None:
        keep.keep(sweep, folder, rows)


def _prepared(sweep: Sweep[Any], out: Path, rows: Path | None) -> tuple[Sequence[Any], list[Path]]:
    """The points, and the folders of those that are yet to be run; what only `out` or only `rows` has of finished runs
    is in both afterwards."""
    check_folder(sweep, out)
    points = planned(sweep, out)
    if text := sweep.preview(points):
        print(text, "\n", sep="", file=sys.stderr, flush=True)
    prepared = [prepare(sweep, point, out) for point in points if not point.problem and not point.same_as]
    for point in points:
        if point.problem:
            print(f"{point.name}: not run, {point.problem}", file=sys.stderr)
    left = [folder for folder in prepared if not (folder / RESULT).exists()]
    if rows is not None:
        left = keep.take(sweep, left, rows)
        for folder in prepared:
            if folder not in left:
                keep.keep(sweep, folder, rows)
    return points, left


if __name__ == "__main__":
    sys.exit(main())
