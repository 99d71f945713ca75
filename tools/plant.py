"""Plants faults one by one in a copy of the tree and lists those that their mirrored tests let through.

    python tools/plant.py --list                     # what would be planted
    python tools/plant.py --only blocks --only 'ITL'  # some, by a word of their area or fault
    python tools/plant.py --table docs/planted-faults.md

The tests have to pass without a fault first. A fault is killed when a test fails, or hangs; it survives when
all pass. Exit code 1: a survivor without an explanation, an explained one that was killed after all, or a
fault under which the tests could not even be collected. A text that is not found exactly once, or a test
file that does not exist, ends the tool before anything runs: mend `tools/mutations.py`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).parent))
from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
KILLED, HUNG, SURVIVED, BROKEN = "killed", "killed (hung)", "survived", "tests not collected"
PASSED, FAILED = 0, 1
"""pytest's exit codes of a run that took place."""
PAGE = """\
# Planted faults

`python tools/plant.py` plants each of these in a copy of the tree and runs the mirrored tests; a fault that
no test notices is a hole in them. It is run by hand, as it takes a while, and this table is what it wrote:
`python tools/plant.py --table docs/planted-faults.md`. The faults themselves stand in `tools/mutations.py`.
A fault that cannot be noticed says why.

"""


class PlantError(Exception):
    """The list does not fit the tree, or the tests fail by themselves."""


@dataclass(frozen=True)
class Result:
    """What became of one planted fault."""

    mutation: Mutation
    outcome: str
    seconds: float = 0.0

    @property
    def is_explained(self) -> bool:
        """Killed, or a survivor that says why; not a survivor's excuse for a fault that was killed."""
        killed = self.outcome in (KILLED, HUNG)
        return killed != bool(self.mutation.survives) and self.outcome != BROKEN


def find(root: Path, mutation: Mutation) -> Path:
    """The one file that holds the mutation's text once; PlantError otherwise."""
    name = f"{mutation.area}: {mutation.fault}"
    for pattern in mutation.tests:
        if not any(root.glob(pattern)):
            raise PlantError(f"{name}: no tests at {pattern}.")
    if mutation.text == mutation.planted:
        raise PlantError(f"{name}: plants what already stands there.")
    found = {path: path.read_text().count(mutation.text) for path in sorted(root.glob(mutation.where))}
    places = sum(found.values())
    if places != 1:
        raise PlantError(f"{name}: its text stands {places} times in {mutation.where}, not once.")
    return next(path for path, count in found.items() if count)


@contextmanager
def planted(root: Path, mutation: Mutation) -> Iterator[None]:
    """The tree with the fault in it."""
    path = find(root, mutation)
    before = path.read_text()
    path.write_text(before.replace(mutation.text, mutation.planted))
    try:
        yield
    finally:
        path.write_text(before)


def run_tests(root: Path, patterns: Iterable[str], timeout_s: float) -> tuple[int | None, str]:
    """pytest's exit code (None: it did not come to an end) and the end of what it said."""
    files = sorted({str(path.relative_to(root)) for pattern in patterns for path in root.glob(pattern)})
    # Compiled files are told apart by size and second: two faults within one second could look alike.
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *files]
    process = subprocess.Popen(
        command,
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as stopped:  # Ctrl-C does not reach a session of its own
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        return None, ""
    return process.returncode, output[-2000:]


def judge(root: Path, mutation: Mutation, timeout_s: float) -> Result:
    """Plant one fault and run its tests."""
    begin = time.perf_counter()
    with planted(root, mutation):
        code, _ = run_tests(root, mutation.tests, timeout_s)
    outcome = {None: HUNG, PASSED: SURVIVED, FAILED: KILLED}.get(code, BROKEN)
    return Result(mutation, outcome, time.perf_counter() - begin)


@contextmanager
def copies(root: Path, count: int) -> Iterator[SimpleQueue[Path]]:
    """`count` copies of the tree, each for one process at a time."""
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(count):
            copy = Path(folder) / str(number)
            shutil.copytree(root, copy, symlinks=True, ignore=LEFT_OUT)
            free.put(copy)
        yield free


def plant(
    root: Path, mutations: Sequence[Mutation], *, jobs: int = 1, timeout_s: float = 600.0
) -> list[Result]:
    """Every mutation's outcome, in order, printed as it is known. PlantError where the list does not fit."""
    for mutation in mutations:
        find(root, mutation)
    with copies(root, jobs) as free, ThreadPoolExecutor(jobs) as pool:
        clean = free.get()
        everything = {pattern for mutation in mutations for pattern in mutation.tests}
        code, output = run_tests(clean, everything, timeout_s * max(len(everything), 1))
        free.put(clean)
        if code != PASSED:
            raise PlantError(f"the tests do not pass without any fault:\n{output}")

        def one(mutation: Mutation) -> Result:
            copy = free.get()
            try:
                result = judge(copy, mutation, timeout_s)
            finally:
                free.put(copy)
            print(
                f"{result.outcome:20} {mutation.area}: {mutation.fault} ({result.seconds:.0f} s)", flush=True
            )
            return result

        return list(pool.map(one, mutations))


def table(mutations: Sequence[Mutation], results: Sequence[Result]) -> str:
    """The page of all mutations; those that were not run say so."""
    outcomes = {result.mutation: result.outcome for result in results}
    killed = sum(outcome in (KILLED, HUNG) for outcome in outcomes.values())
    lines = [f"{len(mutations)} faults, {len(outcomes)} run, {killed} killed.", ""]
    lines += ["| where | fault | tests | outcome |", "|---|---|---|---|"]
    for mutation in mutations:
        outcome = outcomes.get(mutation, "not run")
        why = f": {mutation.survives}" if mutation.survives else ""
        tests = ", ".join(f"`{pattern}`" for pattern in mutation.tests)
        lines.append(f"| {mutation.area} | {mutation.fault} | {tests} | {outcome}{why} |")
    return PAGE + "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every fault was noticed or explained; 1: see the module; 2: the list does not fit the tree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="WORD", help="of an area or a fault; repeatable")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once (default 1)")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a fault's tests may take (600)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table of all faults there")
    parser.add_argument(
        "--list", action="store_true", help="name the faults, check that they fit, plant none"
    )
    options = parser.parse_args(arguments)
    chosen = [
        mutation
        for mutation in MUTATIONS
        if not options.only or any(word in f"{mutation.area}: {mutation.fault}" for word in options.only)
    ]
    try:
        if not chosen:
            raise PlantError(f"no fault's area or name holds {' or '.join(options.only)}.")
        if options.list:
            for mutation in chosen:
                print(f"{find(ROOT, mutation).relative_to(ROOT)}: {mutation.fault}")
            return 0
        results = plant(ROOT, chosen, jobs=options.jobs, timeout_s=options.timeout)
    except PlantError as error:
        print(error, file=sys.stderr)
        return 2
    if options.table is not None:
        options.table.write_text(table(MUTATIONS, results))
    open_ones = [result for result in results if not result.is_explained]
    for result in open_ones:
        print(f"unexplained: {result.outcome}: {result.mutation.area}: {result.mutation.fault}")
    print(f"{len(results)} planted, {len(open_ones)} unexplained")
    return 1 if open_ones else 0


if __name__ == "__main__":
    sys.exit(main())
