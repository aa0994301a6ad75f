"""Check and measure what only a GPU can say, in order of value, within a time limit.

    python -m tools.gpu_check --out FOLDER [--minutes 8] [--only PART ...] [--wheels FOLDER]

Each part is a process of its own with a limit; its output goes to FOLDER/<part>.log. A part that has finished is not
repeated: the same command goes on where an earlier one stopped. FOLDER/gpu_check.md is the result, with hardware and
versions. `--wheels` names the folder that `tools/gpu_check/gather_wheels.sh` made: mamba-ssm and causal-conv1d
are then built for this device while other parts run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.gpu_check.parts import PARTS, select
from tools.gpu_check.runner import Runner
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--minutes", type=float, default=8.0, help="all parts together (default 8)")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(part.name for part in PARTS)}")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="what tools/gpu_check/gather_wheels.sh gathered")
    options = parser.parse_args(arguments)
    try:
        if not torch.cuda.is_available():
            raise UserError("there is no CUDA device here; python -m tools.doctor says why")
        if options.minutes <= 0:
            raise UserError(f"--minutes {options.minutes}: must be above 0")
        parts = select(options.only)
        runner = Runner(options.out, options.minutes * 60, options.wheels)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return runner.run(parts)


if __name__ == "__main__":
    sys.exit(main())
