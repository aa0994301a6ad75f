"""Train the causal (auxiliary) routers of a trained run, everything else frozen.

    deepspeed --num_accelerators N --module tools.train_routers RUN [key.sub=value ...]

The second of MoMa's two stages (arXiv 2407.21770 §2.4): RUN is the folder of a run with routed blocks that has a
checkpoint. Its newest weights go unchanged into a new run, `RUN_routers` (another: run_dir=PATH), where the auxiliary
routers learn to predict the top-k by which the finished model routes. Routers that RUN has trained go on, or begin
anew with `--fresh`; a RUN with `auxiliary: false` gets its first ones. The data go on where RUN stopped. The same
command resumes.

The paper's settings are the default: AdamW, 10,000 steps, learning rate from 1e-4 linearly to 1e-6 after a warm-up of
a fifth of the steps; the batch is RUN's. `train.calibrate_rows=ROWS` sets thresholds at the end, so that causal routing
takes as many tokens as top-k did.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pretrain.process_group import leave
from pretrain.second_stage import begin, second_stage
from pretrain.train import launch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.train_routers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of the trained run")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value")
    parser.add_argument("--fresh", action="store_true", help="begin anew where RUN has auxiliary routers")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)
    return launch(
        lambda: second_stage(options.run, options.overrides), lambda recipe: begin(options.run, recipe, options.fresh)
    )


if __name__ == "__main__":
    leave(main())
