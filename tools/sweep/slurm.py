"""A sweep's runs as a job array of Slurm, so that a cluster does them and the report reads what they leave."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.sweep import launch
from tools.sweep.kind import Sweep
from zoo.files import atomic_write

SCRIPT = """\
#!/usr/bin/env bash
# {count} runs of a sweep, a task each. Partition, time and devices are the cluster's: give them to sbatch, such as
#   sbatch --partition=PARTITION --time=24:00:00 --gpus-per-task={accelerators} {path}
# A task that is stopped or fails goes on from its newest checkpoint when the script is submitted anew; finished runs
# end at once.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}%{jobs}
#SBATCH --ntasks=1
#SBATCH --output=/dev/null
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -eu
runs=(
{runs}
)
cd {place}
run="${{runs[$SLURM_ARRAY_TASK_ID]}}"
exec srun --ntasks=1 --output="$run/{log}" --open-mode=append {words} "$run"
"""


def write_script(sweep: Sweep[Any], folders: Sequence[Path], out: Path, jobs: int) -> Path:
    """`sweep.sbatch` in `out`; returns its path.

    Args:
        folders: of the runs, as `folder.prepare` left them.
        jobs: tasks at the same time.
    """
    path = out / "sweep.sbatch"
    text = SCRIPT.format(
        count=len(folders),
        accelerators=sweep.accelerators,
        path=shlex.quote(str(path)),
        name=shlex.quote(f"sweep-{out.name}"),
        last=len(folders) - 1,
        jobs=jobs,
        runs="\n".join(shlex.quote(str(folder)) for folder in folders),
        place=shlex.quote(os.getcwd()),
        log=launch.LOG,
        words=shlex.join(launch.command(sweep, folders[0])[:-1]),
    )
    atomic_write(path, text)
    return path
