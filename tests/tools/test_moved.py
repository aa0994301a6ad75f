"""Commands that have moved name their new place."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

import tools


@pytest.mark.parametrize("name", tools.MOVED)
def test_the_new_command_exists_and_the_old_one_does_not(name: str) -> None:
    assert importlib.util.find_spec(tools.MOVED[name]) is not None
    with pytest.raises(SystemExit) as left:
        tools.refuse_moved(["python", "-u", "-m", name, "FOLDER"])
    assert left.value.code == 2


def test_the_command_says_where_it_is() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.make_digits", "x"], capture_output=True, text=True)
    expected = "error: tools.make_digits has moved; its command is python -m tools.examples.make_digits\n"
    assert (done.returncode, done.stderr) == (2, expected)
    tools.refuse_moved([sys.executable, "-m", "tools.check", "tools.make_digits"])
