"""What a gate compares: two ways to run one workload, each run a fresh process."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from backbench.errors import HarnessError
from backbench.harness.gate.policy import Policy
from backbench.reports.record import RunDirectory, RunRecord

BASELINE, CANDIDATE = "baseline", "candidate"


@dataclass(frozen=True)
class Arm:
    """One side: options of `bench run`, and the code and interpreter that run them."""

    name: str
    """"baseline" or "candidate"."""
    options: tuple[str, ...] = ()
    tree: Path | None = None
    """A checkout to run instead of the installed package."""
    python: str = sys.executable

    def describe(self) -> dict[str, str]:
        """For people and for gate.json."""
        found = {"options": shlex.join(self.options)}
        return found if self.tree is None else found | {"tree": self.tree.name}


class MeasureRun(Protocol):
    """Runs one arm once and returns its record; raises HarnessError where that could not be done."""

    def __call__(self, arm: Arm, policy: Policy, seed: int, out: Path) -> RunRecord: ...


def run_in_process(arm: Arm, policy: Policy, seed: int, out: Path) -> RunRecord:
    """One fresh `bench run`. Its exit code does not matter here: the record says what was wrong."""
    command = [arm.python, "-m", "backbench", "run", "--workload", policy.workload]
    command += [*policy.options, *arm.options, "--seed", str(seed), "--out", str(out)]
    environment = dict(os.environ)
    if arm.tree is not None:
        environment["PYTHONPATH"] = str(arm.tree)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if not (out / "run.json").is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise HarnessError(f"The {arm.name} could not run ({shlex.join(arm.options)}): {last}")
    return RunDirectory.open(out).read_record()


def parse_arm(name: str, text: str) -> Arm:
    """An arm from the command line: options of `bench run` ("--backend flash") or the path of a checkout.

    Raises:
        HarnessError: neither.
    """
    if text.lstrip().startswith("-"):
        return Arm(name, tuple(shlex.split(text)))
    tree = Path(text).expanduser()
    if (tree / "backbench" / "__init__.py").is_file():
        return Arm(name, tree=tree.resolve())
    raise HarnessError(
        f"--{name} takes options of bench run, such as '--backend triton', or a checkout's folder; "
        f"{text[:80]!r} is neither."
    )
