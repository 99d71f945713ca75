"""A sweep's directory: planning cells into it, and how each one stands, by what lies there alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from backbench.errors import HarnessError, ReportError, shown
from backbench.harness.options import RunOptions, run_options
from backbench.harness.repeats import order
from backbench.harness.sweep.campaign import Campaign
from backbench.harness.sweep.lease import BROKEN, FAILED, HELD, STALE_S, Lease, forgive, hashed, leases
from backbench.reports.record import RunDirectory
from backbench.reports.record.sweep import (
    CELL_FILE,
    CELLS,
    Cell,
    Measured,
    Sweep,
    is_sweep,
    misplaced,
    read_sweep,
    write_json,
)
from backbench.reports.verify import verify

DONE, RUNNING, WAITING, GIVEN_UP = "done", "running", "waiting", "failed"
MOST_FAILURES = 2
"""Failed attempts after which a cell is given up."""
MOST_BREAKS = 10
"""Attempts whose worker vanished after which it is given up, too: perhaps the cell takes workers down."""


@dataclass(frozen=True)
class State:
    """How a cell stands."""

    kind: str
    """DONE, RUNNING, WAITING or GIVEN_UP."""
    note: str = ""
    """Why it failed or waits again; of a running one, where."""
    host: str = ""
    """Hash of the host that measured it or is about to; "" = none."""
    code: str = ""
    """Digest of the code that measured it."""
    seconds: float | None = None
    """What the run took."""


def planned(campaign: Campaign, out: Path, command: str) -> tuple[Sweep, dict[Cell, dict[str, Any]]]:
    """The campaign as a sweep in `out`, and what each of its cells runs; nothing is written.

    Raises:
        HarnessError: the directory holds something else.
    """
    if is_sweep(out):
        if (name := read_sweep(out).name) != campaign.name:
            raise HarnessError(f"{out} holds the campaign {shown(name)}; choose another directory.")
    elif out.exists() and (not out.is_dir() or any(each.name != CELLS for each in out.iterdir())):
        raise HarnessError(f"{out} is not empty and holds no sweep; choose another directory.")
    by_place = {str(place): point for place, point in enumerate(campaign.points)}
    contents = {}
    for block, place in order(tuple(by_place), campaign.repeats):
        point = by_place[place]
        options = replace(point.options, seed=point.options.seed + block)
        content = {"options": options.asked(), "block": block, "files": _files(options)}
        cell = Cell(identity(content), point.arm, point.condition, block, options.seed)
        contents[cell] = content
    return Sweep(out, campaign.name, campaign.repeats, command, tuple(contents)), contents


def plan(campaign: Campaign, out: Path, command: str) -> Sweep:
    """Write the campaign's cells into `out`, new, empty, or this campaign's; cells that are there stay.

    Cells of an earlier plan that the campaign no longer asks for stay on the disk and out of the sweep.
    """
    sweep, contents = planned(campaign, out, command)
    for cell, content in contents.items():
        directory = sweep.directory(cell)
        if not (directory / CELL_FILE).is_file():
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / CELL_FILE, content)
    sweep.write()
    return sweep


def identity(content: Mapping[str, Any]) -> str:
    """A cell's name: the hash of what it runs."""
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _files(options: RunOptions) -> dict[str, str]:
    """Digests of the files that the options name, so that another content is another cell."""
    named = {name: getattr(options, name) for name in ("workload", "backend", "attention", "linear", "ops")}
    return {
        name: sha256(Path(value).read_bytes()).hexdigest()
        for name, value in named.items()
        if value is not None and Path(value).is_file()
    }


def options_of(directory: Path) -> RunOptions:
    """What a cell runs.

    Raises:
        HarnessError: cell.json is not what was planned, or a file it names is not what it was.
    """
    file = directory / CELL_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        whole = identity(content) == directory.name
    except (OSError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise HarnessError(f"{file} is not what was planned; remove {directory} and plan again.")
    options = run_options(content["options"])
    found = _files(options)
    for name, digest in content["files"].items():
        if found.get(name) != digest:
            value = shown(getattr(options, name), 80)
            raise HarnessError(
                f"The {name} {value} is not here as it was planned; restore it, or plan again."
            )
    return options


def left_out(sweep: Sweep) -> int:
    """Cells of earlier plans that the sweep no longer has."""
    asked = {cell.id for cell in sweep.cells}
    cells = sweep.path / CELLS
    return sum(each.name not in asked for each in cells.iterdir()) if cells.is_dir() else 0


def retry(sweep: Sweep) -> None:
    """Let failures no longer count."""
    for cell in sweep.cells:
        forgive(sweep.directory(cell))


@dataclass
class Look:
    """Looks at cells; a result that was verified and did not change since is not verified again."""

    sweep: Sweep
    stale_s: float = STALE_S
    _verified: dict[tuple[object, ...], str] = field(default_factory=dict)

    def at(self, cell: Cell) -> State:
        """How this cell stands now."""
        directory, result = self.sweep.directory(cell), self.sweep.result(cell)
        if not directory.is_dir():  # not planned yet
            return State(WAITING)
        wrong = self.problem(cell) if result.is_dir() else ""
        if result.is_dir() and not wrong:
            measured = Measured.read(result)
            assert measured is not None
            return State(DONE, "", measured.host, measured.code, measured.seconds)
        found = leases(directory)
        ends = {lease.number: lease.how for lease in found}
        if found and ends[found[-1].number] == HELD and not found[-1].stale(self.stale_s):
            return _running(found[-1])
        failed = [lease for lease in found if ends[lease.number] == FAILED]
        broken = sum(how == BROKEN for how in ends.values())
        reason = failed[-1].reason if failed else ""
        if len(failed) >= MOST_FAILURES:
            return State(GIVEN_UP, reason)
        if broken >= MOST_BREAKS:
            return State(GIVEN_UP, reason or f"its worker vanished {broken} times")
        return State(WAITING, f"its result does not verify: {wrong}" if wrong else reason)

    def problem(self, cell: Cell) -> str:
        """Why the result that is there does not count; "" where it does."""
        result = self.sweep.result(cell)
        try:
            stamp = (cell.id, *sorted((each.name, *_stamp(each)) for each in result.iterdir()))
        except OSError as error:
            return f"{error.strerror}"
        if stamp not in self._verified:
            self._verified[stamp] = problem(result, cell.id)
        return self._verified[stamp]


def problem(run: Path, cell: str) -> str:
    """Why the run here is no result of this cell; "" where it is."""
    try:
        directory = RunDirectory.open(run)
        record = directory.read_record()
        if record.run.get("status") != "complete":
            return f"its status is {shown(record.run.get('status'))}"
        return misplaced(run, cell, record) or next(iter(verify(directory)), "")
    except ReportError as error:
        return str(error)


def _stamp(file: Path) -> tuple[int, int, int]:
    found = file.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _running(lease: Lease) -> State:
    owner = lease.owner
    if owner is None:
        return State(RUNNING)
    return State(RUNNING, f"on {owner.host}, seen {lease.age_s():.0f} s ago", hashed(owner.host))
