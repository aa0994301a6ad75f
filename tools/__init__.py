"""Commands. One that has moved is refused here, with its new name."""

import itertools
import sys

MOVED = {
    f"tools.{name}": f"tools.examples.{name}"
    for name in (
        "evaluate_digits",
        "make_captions",
        "make_digit_grids",
        "make_digits",
        "make_llava",
        "pretrain_tower",
    )
} | {"tools.adapt_sweep": "tools.sweep"}
"""Old names of commands, `python -m NAME`, and their new ones."""


def refuse_moved(words: list[str]) -> None:
    """Leave with exit code 2 where the command line `words` runs a module by its old name."""
    for flag, name in itertools.pairwise(words):
        if flag == "-m" and name in MOVED:
            print(f"error: {name} has moved; its command is python -m {MOVED[name]}", file=sys.stderr)
            raise SystemExit(2)


refuse_moved(sys.orig_argv)
