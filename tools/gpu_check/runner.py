"""Runs parts one after the other within a time limit, keeps what they said, and writes the page."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.bench.report import conditions
from tools.gpu_check.parts import CheckPart

LEAST = 15.0
"""Seconds under which no part is begun."""
SHOWN = 40
"""Last lines of each part's output on the page."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    state: str
    """ "passed", "failed", "timed out" or "not run"."""
    seconds: float = 0.0
    detail: str = ""


class Runner:
    """One check.

    Args:
        out: folder for logs, results and the page; made if need be.
        seconds: for all parts together.
        wheels: folder with the source packages of the extensions; None: they are not built.
        device: whose name the page carries.
    """

    def __init__(self, out: Path, seconds: float, wheels: Path | None = None, device: str = "cuda") -> None:
        self.out, self.ends, self.wheels, self.device = out, time.monotonic() + seconds, wheels, device
        out.mkdir(parents=True, exist_ok=True)
        self.results = out / "results.json"
        self.outcomes: dict[str, Outcome] = {}
        if self.results.exists():
            known = json.loads(self.results.read_text(encoding="utf-8"))
            self.outcomes = {name: Outcome(**values) for name, values in known.items()}

    def run(self, parts: Sequence[CheckPart]) -> int:
        """Run what has not passed yet; 0 where all passed."""
        build = self._begin_build()
        for part in parts:
            if self.outcomes.get(part.name, Outcome("not run")).state == "passed":
                print(f"{part.name}: passed before")
                continue
            if part.extensions and build is not None:
                self._wait_for(build)
                build = None
            self.outcomes[part.name] = outcome = self._one(part)
            print(f"{part.name}: {outcome.state} in {outcome.seconds:.0f} s  {outcome.detail}", flush=True)
            self._write(parts)
        if build is not None:
            build.terminate()
        return int(any(self.outcomes[part.name].state != "passed" for part in parts))

    def _one(self, part: CheckPart) -> Outcome:
        left = self.ends - time.monotonic()
        if left < LEAST:
            return Outcome("not run", detail="no time was left; give the same command again")
        began, log = time.monotonic(), self.out / f"{part.name}.log"
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with log.open("w", encoding="utf-8") as file:
            try:
                done = subprocess.run(
                    part.command(self.out),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=min(part.limit, left),
                    env=environment,
                    check=False,
                )
                state = "passed" if done.returncode == 0 else "failed"
            except subprocess.TimeoutExpired:
                state = "timed out"
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return Outcome(state, time.monotonic() - began, lines[-1][:200] if lines else "")

    def _begin_build(self) -> subprocess.Popen[bytes] | None:
        """Build the extensions for this device alone, in the background."""
        if self.wheels is None or self.outcomes.get("build", Outcome("")).state == "passed":
            return None
        major, minor = torch.cuda.get_device_capability()
        script = Path(__file__).with_name("build_extensions.sh")
        log = (self.out / "build.log").open("w", encoding="utf-8")
        command = ["bash", str(script), str(self.wheels), f"{major}{minor}"]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _wait_for(self, build: subprocess.Popen[bytes]) -> None:
        began = time.monotonic()
        try:
            code = build.wait(timeout=max(self.ends - began - 2 * LEAST, 1))
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            build.terminate()
            state = "timed out"
        waited = time.monotonic() - began
        self.outcomes["build"] = Outcome(state, waited, "seconds: waited for after the parts before")
        print(f"build: {state}, waited {waited:.0f} s", flush=True)

    def _write(self, parts: Sequence[CheckPart]) -> None:
        values = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        self.results.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (self.out / "gpu_check.md").write_text(self._page(parts), encoding="utf-8")

    def _page(self, parts: Sequence[CheckPart]) -> str:
        facts = conditions(self.device, False, 3)
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            "# What a GPU said",
            "",
            f"{facts['machine']['device']}; {facts['machine']['processor']}; {versions}; {facts['date']}.",
            "",
            "| part | result | seconds | |",
            "|---|---|---|---|",
        ]
        for part in parts:
            outcome = self.outcomes.get(part.name, Outcome("not run"))
            lines.append(f"| {part.name} | {outcome.state} | {outcome.seconds:.0f} | {part.about} |")
        for part in parts:
            log = self.out / f"{part.name}.log"
            if log.exists():
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN:]
                lines += ["", f"## {part.name}", "", "```", *tail, "```"]
        return "\n".join(lines) + "\n"
