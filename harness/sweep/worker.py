"""A worker: claims a cell, runs it, verifies it, publishes it, until nothing is left to do.

Every run is a process of its own, which is what makes runs comparable (caches, allocators, peak memory);
so each loads its model. The worker does nothing meanwhile but show life.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from backbench.errors import INVALID, WRONG, BackbenchError, ReportError
from backbench.harness.gate.arms import HERE, digest
from backbench.harness.options import RunOptions
from backbench.harness.provenance import redact
from backbench.harness.repeats import Ended, arguments, in_new_process
from backbench.harness.sweep.cells import (
    DONE,
    GIVEN_UP,
    MOST_FAILURES,
    RUNNING,
    WAITING,
    Look,
    State,
    options_of,
    problem,
)
from backbench.harness.sweep.lease import (
    FAILED,
    RELEASED,
    STALE_S,
    Lease,
    LeaseLost,
    claim,
    hashed,
    leases,
    me,
)
from backbench.reports.record import RunDirectory
from backbench.reports.record.sweep import MEASURED_FILE, Cell, Measured, Sweep, read_sweep, write_json

CHILD = "backbench.harness.sweep.child"
POLL_S = 2.0
"""How often a worker looks whether a cell became free."""

Measure = Callable[[RunOptions, Path, Callable[[], None]], Ended]
"""Runs options into a directory, and calls back every few seconds; what that raises ends the run."""


def measure_in_process(options: RunOptions, out: Path, beat: Callable[[], None]) -> Ended:
    """One fresh `bench run`, which ends with this process. Its path is kept in the record: a relative one."""
    typed = arguments(options, {"backend": options.backend}, options.seed, Path(os.path.relpath(out)))
    return in_new_process([str(os.getpid()), *typed], CHILD, beat)


@dataclass
class Worker:
    """One worker on one sweep."""

    path: Path
    """The sweep's directory."""
    tell: Callable[[str], None]
    measure: Measure = measure_in_process
    stale_s: float = STALE_S
    poll_s: float = POLL_S
    host: str = field(default_factory=lambda: hashed(me().host))
    look: Look | None = None

    def work(self, once: bool = False) -> None:
        """Run cells until each is done or given up; `once`: at most one, without waiting for a free one.

        Raises KeyboardInterrupt after the cell in progress was given back.
        """
        while True:
            sweep = read_sweep(self.path)  # it may have been planned anew
            self.look = replace(self.look, sweep=sweep) if self.look else Look(sweep, self.stale_s)
            states = {cell: self.look.at(cell) for cell in sweep.cells}
            if all(state.kind in (DONE, GIVEN_UP) for state in states.values()):
                return
            ran = any(self._try(sweep, cell, states) for cell in in_turn(states, self.host))
            if once:
                return
            if not ran:
                time.sleep(self.poll_s)

    def _try(self, sweep: Sweep, cell: Cell, states: dict[Cell, State]) -> bool:
        """Run the cell, if it is still free."""
        lease = claim(sweep.directory(cell), self.stale_s)
        if lease is None:
            return False
        done = sum(state.kind == DONE for state in states.values())
        which = f"{cell.point}, run {cell.block + 1} ({done} of {len(states)} done)"
        try:
            self._attempt(sweep, cell, lease, which)
        except (LeaseLost, FileNotFoundError, ReportError):
            if lease.held.exists():
                raise
            self.tell(f"Another worker took over {which}; this one was silent for too long")
        except KeyboardInterrupt:
            if lease.held.exists():
                lease.end(RELEASED)
            raise
        return True

    def _attempt(self, sweep: Sweep, cell: Cell, lease: Lease, which: str) -> None:
        """Run the cell under this lease, and publish it or keep why it failed; raises LeaseLost."""
        assert self.look is not None
        result = sweep.result(cell)
        if result.is_dir():
            if not self.look.problem(cell):  # published between the look and the claim
                lease.end(RELEASED)
                return
            result.rename(lease.held / "rejected")
        self.tell(f"Running {which}")
        if why := self._run(cell, lease):
            lease.fail(redact(why))
            attempt = sum(each.how == FAILED for each in leases(lease.cell))
            self.tell(f"Failed, attempt {attempt} of {MOST_FAILURES}: {cell.point}: {redact(why)}")
        else:
            lease.publish()

    def _run(self, cell: Cell, lease: Lease) -> str:
        """Why the run is no result; "" where it is one, ready to publish."""
        started = time.monotonic()
        try:
            options = options_of(lease.cell)
        except BackbenchError as error:
            return str(error)
        code = digest(HERE)
        ended = self.measure(options, lease.run, lease.beat)
        seconds = round(time.monotonic() - started, 3)
        lease.beat()
        if ended.code not in (0, INVALID, WRONG):
            return ended.last
        try:
            run = RunDirectory.open(lease.run).read_record().run
        except ReportError:
            return ended.last
        measured = Measured(cell.id, str(run.get("uuid")), self.host, code, seconds)
        write_json(lease.run / MEASURED_FILE, asdict(measured))
        return problem(lease.run, cell.id)


def in_turn(states: dict[Cell, State], host: str) -> Iterator[Cell]:
    """The cells that a worker on this host may claim, the most wanted first.

    The arms of a condition and block are to be compared, so the host that began them runs them all as long
    as it works: a difference between hosts is none between arms.
    """
    begun: dict[tuple[str, int], set[str]] = {}
    for cell, state in states.items():
        if state.host:
            begun.setdefault((cell.condition, cell.block), set()).add(state.host)
    working = {state.host for state in states.values() if state.kind == RUNNING}
    ranked: list[list[Cell]] = [[], [], []]
    for cell, state in states.items():
        if state.kind != WAITING:
            continue
        hosts = begun.get((cell.condition, cell.block), set())
        if host in hosts:
            ranked[0].append(cell)
        elif not hosts:
            ranked[1].append(cell)
        elif not hosts & working:
            ranked[2].append(cell)
    for cells in ranked:
        yield from cells
