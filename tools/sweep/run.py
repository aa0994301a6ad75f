"""One run of a sweep, in a process of its own.

    python -m tools.sweep.run TYPE FOLDER

FOLDER holds `point.json`, written by the sweep of that type; it gets `result.json`. Its folder `run` is gone
afterwards.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import sys
from pathlib import Path

from tools.sweep.folder import POINT, RESULT, RUN, write_json
from tools.sweep.kinds import KINDS
from zoo.config import UserError


def main(arguments: list[str] | None = None) -> int:
    kind, name = sys.argv[1:] if arguments is None else arguments
    folder = Path(name)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the training is waited for
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that a killed sweep has left behind ends soon
        if not (folder / RESULT).exists():
            try:
                result = KINDS[kind].run(folder, json.loads((folder / POINT).read_text()))
                write_json(folder / RESULT, result)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                return 130
        shutil.rmtree(folder / RUN, ignore_errors=True)  # with its checkpoints
    return 0


if __name__ == "__main__":
    sys.exit(main())
