"""`python -m tools.doctor` runs anywhere and says for everything that does not load why."""

from __future__ import annotations

import pytest
import torch

from tools import doctor
from zoo.kernels import OPERATIONS, missing


def test_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    for name in ("cpu", "cuda", "torch", "deepspeed", "g++", "kernels.attention", "kernels.experts"):
        assert name in printed


def test_it_takes_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["recipes/quickstart.yaml"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: recipes/quickstart.yaml: tools.doctor takes no argument") and not said.out


def test_every_state_has_a_reason() -> None:
    rows = [*doctor.accelerators(), *doctor.packages(), *doctor.compilers(), *doctor.kernels()]
    assert all(name and state and detail for name, state, detail in rows)
    states = {name: state for name, state, _ in rows}
    assert states["torch"] == "yes"
    assert (states.get("cuda", "yes") == "no") is not torch.cuda.is_available()


def test_every_backend_of_every_kernel_works_or_says_why_not() -> None:
    rows = doctor.kernels()
    names = [name.strip() for name, _, _ in rows]
    for operation, backends in OPERATIONS.items():
        at = names.index(f"kernels.{operation}")
        group = rows[at : at + len(backends)]  # what auto takes, and the others
        assert {group[0][1], *names[at + 1 : at + len(backends)]} == set(backends)
        for name, state, detail in group[1:]:
            reason = missing(operation, name.strip())
            assert (state, detail) == (("yes", "works here") if reason is None else ("no", reason))


def test_a_package_that_does_not_load_is_not_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(doctor, "GPU_MODULES", {"xformers": "no_such_module.ops"})
    rows = {name: (state, detail) for name, state, detail in doctor.packages()}
    assert rows["xformers"] == ("no", "1.0: ModuleNotFoundError: No module named 'no_such_module'")
