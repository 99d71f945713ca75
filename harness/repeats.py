"""Several runs of one or more backends and schemes: a fresh process each, in turns, in one directory.

Neighbouring runs of a block replay the same requests, so that their ratio holds neither the draw of the
requests nor a slow drift of the machine. The order turns from block to block (A B, B A, A B, ...), which
takes what is left of a drift out of the mean.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from backbench.errors import INTERRUPTED, HarnessError, ReportError
from backbench.harness.experiment import default_directory
from backbench.harness.options import RunOptions, option_names
from backbench.options import flag
from backbench.reports.record import RunDirectory
from backbench.reports.record.experiment import EXPERIMENT_FILE, Experiment, Listed

TOLD_EVERY_S = 10.0
"""A run that takes longer is said to be still going."""
MEANWHILE_S = 5.0
"""How often a waiting parent looks up."""

Launch = Callable[[Sequence[str]], "Ended"]
"""Runs `bench` with these arguments in a process of its own."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    said: str
    """What it wrote to stderr."""

    @property
    def last(self) -> str:
        """The last line that it said, or its exit code."""
        lines = self.said.strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"it ended with code {self.code}."


@dataclass(frozen=True)
class Repeats:
    """A series as it ended."""

    experiment: Experiment
    code: int
    """The worst exit code of its runs."""


def backends(options: RunOptions) -> list[str]:
    """The backends of "torch,sdpa"; raises HarnessError where a name is empty."""
    names = [name.strip() for name in options.backend.split(",")]
    if not all(names):
        raise HarnessError(f"--backend {options.backend!r} has an empty name; write it as torch,sdpa.")
    return names


def asked_arms(options: RunOptions) -> dict[str, dict[str, str]]:
    """Name of the arm -> the options that it alone has: every backend with every scheme of `--quantize`."""
    schemes = options.quantize.split(",") if options.quantize else []
    several = backends(options)
    if len(schemes) < 2:
        return _named([({"backend": name}, name) for name in several])
    pairs = [({"backend": name, "quantize": each}, each) for name in several for each in schemes]
    return _named([(own, each if len(several) == 1 else f"{own['backend']} {each}") for own, each in pairs])


def is_series(options: RunOptions) -> bool:
    """Whether these options ask for more than one run."""
    return options.repeat > 1 or len(asked_arms(options)) > 1


class Going:
    """Says of each run that it begins, and every `every_s` that it still goes on."""

    def __init__(
        self, tell: Callable[[str], None], every_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tell, self._every_s, self._clock = tell, every_s, clock

    def begin(self, which: str) -> None:
        """A run begins."""
        self._which, self._start_s = which, self._clock()
        self._next_s = self._start_s + self._every_s
        self._tell(which)

    def look(self) -> None:
        """Time has passed."""
        if (now_s := self._clock()) >= self._next_s:
            self._next_s = now_s + self._every_s
            self._tell(f"{self._which}, {now_s - self._start_s:.0f} s so far")


def run_repeats(
    options: RunOptions,
    tell: Callable[[str], None],
    launch: Launch | None = None,
    every_s: float = TOLD_EVERY_S,
) -> Repeats:
    """Run every backend `options.repeat` times; what finished stays, whatever ends the series.

    `tell` hears of each run when it begins, and every `every_s` that it is still going.

    Ctrl-C and SIGTERM end the run in progress as they end a single one, and then the series (code 130).

    Raises:
        HarnessError: a run could not be made; the message says how many are kept.
    """
    going = Going(tell, every_s)
    launch = launch or partial(in_new_process, meanwhile=going.look)
    arms = asked_arms(options)
    experiment = Experiment(claim_experiment(options), tuple(arms), options.repeat, options.command)
    experiment.write()
    code, total = 0, options.repeat * len(arms)
    try:
        for number, (block, arm) in enumerate(order(tuple(arms), options.repeat), 1):
            going.begin(f"Run {number} of {total}: {arm}, block {block + 1}")
            name = f"{number:0{len(str(total))}d}-{Path(arm).stem}"
            seed = options.seed + block
            ended = launch(arguments(options, arms[arm], seed, experiment.path / name))
            if ended.code == INTERRUPTED:
                return Repeats(experiment, INTERRUPTED)
            uuid = _finished(experiment.path / name)
            if uuid is None:
                kept = f" {len(experiment.runs)} finished runs are kept." if experiment.runs else ""
                raise HarnessError(f"Run {number} ({arm}) failed: {ended.last}{kept}")
            experiment = experiment.with_run(Listed(name, arm, block, seed, uuid))
            experiment.write()
            code = max(code, ended.code)
    except KeyboardInterrupt:
        return Repeats(experiment, INTERRUPTED)
    finally:
        if not experiment.runs:
            remove_experiment(experiment)
    return Repeats(experiment, code)


def order(arms: tuple[str, ...], blocks: int) -> Iterator[tuple[int, str]]:
    """(block, arm) in the order they run: A B, B A, A B, ..."""
    for block in range(blocks):
        for arm in arms if block % 2 == 0 else arms[::-1]:
            yield block, arm


def arguments(options: RunOptions, own: Mapping[str, str], seed: int, out: Path) -> list[str]:
    """The command line of one run of the series; `own`: what its arm alone has."""
    asked = options.asked() | dict(own) | {"seed": seed, "out": str(out)}
    asked.pop("repeat", None)
    found = ["run", "--no-report", "--quiet"]
    for name, value in asked.items():
        typed = option_names()[name][1].flag
        if isinstance(value, bool):
            found.append(typed if value else flag(f"no_{name}"))
        elif isinstance(value, dict):
            found.append(f"{typed}={','.join(f'{key}={each}' for key, each in value.items())}")
        elif isinstance(value, tuple):
            found += [typed, *map(str, value)]
        else:
            found.append(f"{typed}={value}")
    return found


def in_new_process(
    arguments: Sequence[str], module: str = "backbench", meanwhile: Callable[[], None] = lambda: None
) -> Ended:
    """Run this same Backbench; an interruption is handed on once, and waited for.

    `meanwhile` is called every few seconds; what it raises interrupts the process, too.
    """
    process = start_process(arguments, module, stderr=subprocess.PIPE)
    try:
        said = _said(process, meanwhile)
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate()
        finally:
            if process.poll() is None:  # interrupted again
                process.kill()
                process.wait()
        raise
    return Ended(process.returncode, said)


def start_process(arguments: Sequence[str], module: str, stderr: int | None = None) -> subprocess.Popen[str]:
    """Start this same Backbench at `module`, heard only on stderr.

    Its process group is its own: Ctrl-C in a terminal reaches a whole group, and a second interruption
    would cut short what the first makes it write.
    """
    home = str(Path(__file__).parents[2])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        process_group=0,
    )


def _said(process: subprocess.Popen[str], meanwhile: Callable[[], None]) -> str:
    while True:
        try:
            return process.communicate(timeout=MEANWHILE_S)[1]
        except subprocess.TimeoutExpired:
            meanwhile()


def _named(wanted: Iterable[tuple[dict[str, str], str]]) -> dict[str, dict[str, str]]:
    """Name -> options; an arm against itself is told apart by a number."""
    arms: dict[str, dict[str, str]] = {}
    for own, name in wanted:
        free = next(f"{name} ({number})" for number in count(2) if f"{name} ({number})" not in arms)
        arms[name if name not in arms else free] = own
    return arms


def claim_experiment(options: RunOptions) -> Path:
    """A new or empty directory for several runs."""
    if options.out is not None:
        path = RunDirectory.create(options.out).path
        try:
            (path / EXPERIMENT_FILE).open("x").close()
        except FileExistsError:
            raise HarnessError(f"{path} is another experiment's; choose another --out.") from None
        return path
    base = default_directory(options)
    base = base.with_name(base.name.replace(",", "-"))
    for number in count():
        path = base if number == 0 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise HarnessError(f"Cannot create {path}: {error.strerror}; choose another --out.") from None
        return path
    raise AssertionError


def _finished(path: Path) -> str | None:
    """The uuid of the complete run at `path`; None where there is none."""
    try:
        record = RunDirectory.open(path).read_record()
    except ReportError:
        return None
    return str(record.run.get("uuid")) if record.run["status"] == "complete" else None


def remove_experiment(experiment: Experiment) -> None:
    """Take away an experiment in which nothing finished; what an interrupted run measured stays."""
    (experiment.path / EXPERIMENT_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        experiment.path.rmdir()
