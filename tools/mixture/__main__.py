"""Rank mixtures of data without training on them: one run a source from the same start, then merges of their weights.

    python -m tools.mixture MIXTURE.yaml [OUT] [key.sub=value ...]

For mixture weights w over the sources, Σ w_i θ_i, the mean of the weights that the runs of the sources ended with,
stands for the model that would have been trained on that mixture, and is evaluated in its place (linear merging for
data-mixture optimisation, arXiv 2602.04937). It ranks mixtures; it does not foretell their losses. As many models as
the file says are really trained on mixtures, and the report says how well the ranks agree (Spearman, with its
interval).

Every parameter and every buffer of floating point is merged, those of experts and routers too: expert 3 of one run is
expert 3 of the other, because all go on from the same trained start. Tokenizers and codebooks are the start's.

OUT, by default runs/MIXTURE, gets `runs/`, `losses.json`, `report.md` and `ranks.png`. The same command goes on where
it stopped; finished runs are never repeated.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.mixture import report, run
from tools.mixture.settings import read
from zoo.config import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools.mixture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mixture", type=Path, help="YAML file")
    parser.add_argument("rest", nargs="*", default=[], metavar="OUT or key.sub=value")
    options = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folders = [Path(word) for word in options.rest if "=" not in word]
        if len(folders) > 1:
            raise UserError(f"{folders[1]}: one folder is enough, and {folders[0]} is given already; remove one")
        out = folders[0] if folders else Path("runs") / options.mixture.stem
        config = read(options.mixture, [word for word in options.rest if "=" in word])
        found = run.run(config, out)
        written = report.write(config, found, out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(f"{', '.join(path.name for path in written)} are in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
