"""Compare finished pretrainings: curves, savings with intervals, routers, cost, as a page of HTML and as Markdown.

    python -m tools.compare RUN RUN ... [--baseline NAME] [--out FOLDER]

RUN is a run folder. Runs whose recipes differ in the seed alone are one arm, by the name of the recipe; the others are
compared with the baseline, by default the arm of the first run. FOLDER (default: runs/compare) gets `report.html`,
`report.md`, `figures/` and `hparams/` (for `tensorboard --logdir FOLDER/hparams`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.sweep.pretrain.report import write
from tools.sweep.pretrain.study import of_runs
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--baseline", metavar="NAME", help="name of an arm")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    try:
        written = write(of_runs(options.runs, options.baseline), options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{', '.join(path.name for path in written)} are in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
