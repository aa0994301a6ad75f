"""Run what a sweep's file says, many runs that differ in few things, and write one report of them.

    python -m tools.sweep SWEEP.yaml OUT [key.sub=value ...]

The same command goes on where it stopped; finished runs are never repeated, a failed one is tried once more. The key
`type` of the file says of which kind the sweep is:

    adapt   Adapt one dense multimodal LLM in many ways of equal decoder FLOPs, tune all alike, and compare how well
    they
            answer. OUT gets `arank.json`, `runs/<arm>-<target>-<seed>/result.json`, `timing.json`, `results.md`,
            `accuracy.png` or, where that is the metric, `perplexity.png`, and `skip.png`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.sweep.folder import RESULT, check_folder, planned, prepare
from tools.sweep.kind import Sweep
from tools.sweep.kinds import open_sweep
from tools.sweep.launch import launch
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path, help="YAML file")
    parser.add_argument("out", type=Path, help="folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--report", action="store_true", help="only write the report of what has been run")
    parser.add_argument("--no-timing", action="store_true", help="leave out what is timed once all runs are done")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return run(open_sweep(options.sweep, options.overrides), options.out, options.report, options.no_timing)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


def run(sweep: Sweep[Any], out: Path, only_report: bool = False, no_timing: bool = False) -> int:
    """Everything that is not done yet; returns the exit code, 1 where a run failed.

    Raises:
        UserError: a mistake of the user's; it is found before any run is launched.
    """
    check_folder(sweep, out)
    points = planned(sweep, out)
    prepared = [prepare(sweep, point, out) for point in points if not point.problem and not point.same_as]
    for point in points:
        if point.problem:
            print(f"{point.name}: not run, {point.problem}")
    failed = []
    if not only_report:
        failed = launch(sweep, [folder for folder in prepared if not (folder / RESULT).exists()])
        if not no_timing and not failed:
            sweep.measure(points, out)
    written = sweep.report(points, out)
    print(f"{', '.join(path.name for path in written)} are in {out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
