"""What a gate compares: two ways to run one workload, each run a fresh process."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

import backbench
from backbench.errors import INTERRUPTED, HarnessError, shown
from backbench.harness.gate.policy import SET_BY_THE_GATE, Policy
from backbench.harness.provenance import redact
from backbench.reports.record import RECORD_FILE, RunDirectory

BASELINE, CANDIDATE = "baseline", "candidate"
ROOMS = ("backbench", "backends", "engine", "harness", "reports", "workloads")
HERE = Path(backbench.__file__).parents[1]
"""The checkout or site-packages that this process runs from."""
BENCH = "from backbench.harness.cli import main; main()"
"""What `bench` runs; older checkouts have no `backbench.__main__`."""
NO_CHECK = "--no-check"
SPARED = ("--no-report", "--quiet", NO_CHECK)
"""Options that spare what a gate's run need not do. An older arm may not know them, and does it."""


@dataclass(frozen=True)
class Arm:
    """One side: options of `bench run`, and the code and interpreter that run them."""

    name: str
    """"baseline" or "candidate"."""
    options: tuple[str, ...] = ()
    tree: Path | None = None
    """A checkout to run instead of the code that gates; of a ref, known only while it is checked out."""
    ref: str | None = None
    """The git ref whose tree this is."""
    code: str | None = None
    """A ref's commit, else a digest of the code; None = whatever another interpreter has installed."""
    python: str | None = None
    """Another interpreter than this one."""
    stored: str | None = None
    """What its runs, which were made before, are called; nothing of it is run."""

    def describe(self) -> dict[str, str]:
        """For people and for gate.json; redacted."""
        tree = None if self.tree is None or self.ref else self.tree.name
        found = {"options": shlex.join(self.options), "ref": self.ref, "checkout": tree, "code": self.code}
        found["stored"] = self.stored
        found["python"] = None if self.python is None else Path(self.python).name
        return {key: redact(value) for key, value in found.items() if value}


def unchecked(arm: Arm) -> Arm:
    """The arm without the check of its results."""
    return replace(arm, options=(*arm.options, NO_CHECK))


class MeasureRun(Protocol):
    """Runs one arm once into a directory; raises HarnessError where that could not be done."""

    def __call__(self, arm: Arm, policy: Policy, seed: int, out: Path) -> RunDirectory: ...


def run_in_process(arm: Arm, policy: Policy, seed: int, out: Path) -> RunDirectory:
    """One fresh `bench run`. Its exit code does not matter here: the record says what was wrong."""
    asked = [each for each in arm.options if each != NO_CHECK]
    spared = [each for each in SPARED if each != NO_CHECK or NO_CHECK in arm.options]
    known = _help(arm.python or sys.executable, tree_of(arm))
    command = ["run", "--workload", policy.workload, *policy.options, *asked]
    command += [each for each in spared if each in known]
    done = _bench(arm, *command, "--seed", str(seed), "--out", str(out))
    if done.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    if not (out / RECORD_FILE).is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        raise HarnessError(f"The {arm.name} could not run: {last.removeprefix('error: ')}")
    directory = RunDirectory.open(out)
    # A gate reads records; of its many runs nobody opens a page.
    directory.report_path.unlink(missing_ok=True)
    ran = directory.read_record().software.get("git_sha")
    if arm.ref is not None and ran not in (arm.code, None):
        raise HarnessError(f"The {arm.name} ran commit {ran}, not {arm.ref}; is another copy on its path?")
    return directory


def tree_of(arm: Arm) -> Path | None:
    """The checkout that the arm's process imports; None = what its interpreter has installed."""
    return arm.tree or (HERE if arm.python is None else None)


def command_of(python: str, tree: Path | None, code: str) -> tuple[list[str], dict[str, str]]:
    """The command and environment of a process that runs `code` with that tree's package."""
    environment = dict(os.environ)
    if tree is not None:
        environment["PYTHONPATH"] = str(tree)
    # -P: the working directory holds no code, even where that is a checkout.
    return [python, "-P", "-c", code], environment


def _bench(arm: Arm, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`bench` with the arm's code and interpreter."""
    command, environment = command_of(arm.python or sys.executable, tree_of(arm), BENCH)
    command += arguments
    try:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    except OSError as error:
        raise HarnessError(f"The {arm.name} cannot start {command[0]}: {error.strerror}.") from None


@cache
def _help(python: str, tree: Path | None) -> frozenset[str]:
    """The words of `bench run --help`; asked once a checkout."""
    return frozenset(_bench(Arm("arm", tree=tree, python=python), "run", "--help").stdout.split())


def parse_arm(name: str, text: str, python: str | None = None) -> Arm:
    """An arm from the command line: options of `bench run` ("--backend flash"), a checkout's folder, or a git
    ref of the repository around the working directory; empty = the code that gates, as it is.

    Raises:
        HarnessError: none of them.
    """
    if not text.strip() or text.lstrip().startswith("-"):
        try:
            options = tuple(shlex.split(text))
        except ValueError as error:
            raise HarnessError(f"--{name} {shown(text)} cannot be split into options: {error}.") from None
        if taken := next((each for each in options if each.split("=")[0] in SET_BY_THE_GATE), None):
            raise HarnessError(f"--{name}: {taken} is set by the gate for every run; leave it out.")
        return Arm(name, options, code=digest(HERE) if python is None else None, python=python)
    if (tree := _checkout(text)) is not None:
        return Arm(name, tree=tree, code=digest(tree), python=python)
    try:
        commit = git("rev-parse", "--verify", f"{text}^{{commit}}")
    except HarnessError as error:
        raise HarnessError(
            f"--{name} takes options of bench run, such as '--backend triton', a checkout's folder or a "
            f"git ref; {shown(text)} is none of them ({str(error)[:90].rstrip('.')})."
        ) from None
    return Arm(name, ref=text, code=commit, python=python)


def _checkout(text: str) -> Path | None:
    """The folder that this names, where it holds the package."""
    try:
        tree = Path(text).expanduser().resolve()
        return tree if (tree / "backbench" / "__init__.py").is_file() else None
    except (OSError, RuntimeError):  # a name too long for a file, or a home that nobody has
        return None


@contextmanager
def checked_out(arm: Arm, folder: Path) -> Iterator[Arm]:
    """The arm with its ref's tree in `folder`, a worktree of the repository that is removed at the end."""
    if arm.ref is None:
        yield arm
        return
    assert arm.code is not None
    tree = (folder / arm.name).resolve()
    _remove(tree)  # what a killed gate left
    git("worktree", "add", "--detach", "--force", str(tree), arm.code)
    try:
        if not (tree / "backbench" / "__init__.py").is_file():
            raise HarnessError(f"--{arm.name}: {arm.ref} holds no package backbench; name a later ref.")
        yield replace(arm, tree=tree)
    finally:
        _remove(tree)


def _remove(tree: Path) -> None:
    if tree.exists():
        git("worktree", "remove", "--force", str(tree))
    git("worktree", "prune")


def git(*arguments: str) -> str:
    """What git prints, in the working directory; HarnessError with its own last line where it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise HarnessError(f"git cannot be run: {error.strerror}.") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise HarnessError(f"git {arguments[0]}: {said.removeprefix('fatal: ')}")
    return done.stdout.strip()


def digest(tree: Path) -> str:
    """Of the code and its tables in a checkout or an installed package."""
    found = hashlib.sha256()
    rooms = [tree / room for room in ROOMS if (tree / room).is_dir()]
    files = {
        file for room in rooms for kind in ("*.py", "*.json", "*.safetensors") for file in room.rglob(kind)
    }
    for file in sorted(files):
        found.update(file.relative_to(tree).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]
