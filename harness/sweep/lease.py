"""The right to run a cell: a numbered directory, which holds one directory whose name says how it stands.

    lease-3/held/        somebody runs the cell, and shows life by touching owner.json inside
    lease-3/broken/      its holder vanished, and another broke it
    lease-3/failed/      the run failed; reason.txt says why
    lease-3/published/, lease-3/released/, lease-3/forgiven/

A claim is one rename of a prepared directory to the next number. One of many succeeds, since no lease is
ever empty or removed, and so the number fences: it only grows, and only the highest may publish. A run is
written inside `held`, so breaking a lease, which renames `held`, takes the run out of its holder's hands:
there is nothing left at `held/run` to publish. Over NFS a rename may follow the directory that was moved;
therefore a holder looks at the numbers, too, and whatever happens `result/` is one rename of one verified
run, onto which a second one fails.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import psutil

from backbench.reports.record.sweep import RESULT

HELD, BROKEN, FAILED, PUBLISHED, RELEASED, FORGIVEN = (
    "held",
    "broken",
    "failed",
    "published",
    "released",
    "forgiven",
)
OWNER_FILE = "owner.json"
REASON_FILE = "reason.txt"
STALE_S = 60.0
"""A lease whose holder showed no life for so long is broken; holders show it every five seconds."""


class LeaseLost(Exception):
    """Another took the cell over; what this holder ran must not be published."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a lease."""

    host: str
    pid: int
    started: str
    """When, in ticks since the boot: a pid alone may be another's by now."""
    machine: str
    """The boot of the kernel and the namespace in which the pid counts."""

    @property
    def gone(self) -> bool:
        """Known to have ended; False where this machine cannot tell."""
        if self.machine != machine():
            return False
        return not psutil.pid_exists(self.pid) or _started(self.pid) != self.started


def me() -> Owner:
    """This process."""
    return Owner(platform.node(), os.getpid(), _started(os.getpid()), machine())


def machine() -> str:
    """This boot of this kernel, and the namespace of its pids: containers of one host count their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return platform.node()


def _started(pid: int) -> str:
    """Ticks from the boot to a process's start; "" of one that has ended, or where there is no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def hashed(host: str) -> str:
    """A host's name as results keep it."""
    return sha256(host.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Lease:
    """The lease with this number on a cell's directory."""

    cell: Path
    number: int

    @property
    def path(self) -> Path:
        return self.cell / f"lease-{self.number}"

    @property
    def held(self) -> Path:
        return self.path / HELD

    @property
    def run(self) -> Path:
        """Where its holder writes the run."""
        return self.held / "run"

    @property
    def how(self) -> str:
        """How it stands; "held" where that changes right now."""
        return next((each.name for each in self.path.iterdir()), HELD)

    @property
    def reason(self) -> str:
        """Why it failed."""
        try:
            return (self.path / FAILED / REASON_FILE).read_text(encoding="utf-8").strip()
        except OSError:
            return "its reason is lost"

    @property
    def owner(self) -> Owner | None:
        """None of one that is not held, or is not to be read."""
        try:
            return Owner(**json.loads((self.held / OWNER_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def age_s(self) -> float:
        """Since its holder showed life, by the file system's own clock; 0 where it is not held."""
        try:
            seen = (self.held / OWNER_FILE).stat().st_mtime
        except FileNotFoundError:
            return 0.0
        os.utime(self.cell)
        return self.cell.stat().st_mtime - seen

    def stale(self, after_s: float) -> bool:
        """Its holder has ended, or showed no life for `after_s`."""
        owner = self.owner
        return (owner is not None and owner.gone) or self.age_s() > after_s

    def beat(self) -> None:
        """Show life; raises LeaseLost."""
        try:
            os.utime(self.held / OWNER_FILE)
        except FileNotFoundError:
            raise LeaseLost from None

    def publish(self) -> None:
        """Make the run the cell's result, in one rename; raises LeaseLost."""
        self.beat()
        if leases(self.cell)[-1] != self:
            raise LeaseLost
        try:
            _sync(self.run)
            self.run.rename(self.cell / RESULT)
        except FileNotFoundError:
            raise LeaseLost from None
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise LeaseLost from None
        _sync_directory(self.cell)
        self.end(PUBLISHED)
        for lease in leases(self.cell):  # what was begun and is of no more use
            shutil.rmtree(lease.path / lease.how / "run", ignore_errors=True)

    def fail(self, reason: str) -> None:
        """Keep why the run failed; raises LeaseLost."""
        try:
            (self.held / REASON_FILE).write_text(reason + "\n", encoding="utf-8")
        except FileNotFoundError:
            raise LeaseLost from None
        self.end(FAILED)

    def end(self, how: str) -> None:
        """Hold it no longer; raises LeaseLost."""
        try:
            self.held.rename(self.path / how)
        except FileNotFoundError:
            raise LeaseLost from None
        (self.path / how / OWNER_FILE).unlink(missing_ok=True)  # a host's name stays only while it is needed


def leases(cell: Path) -> list[Lease]:
    """All that a cell ever had, the highest last."""
    names = [re.fullmatch("lease-([0-9]+)", each.name) for each in cell.iterdir()]
    return [Lease(cell, number) for number in sorted(int(match[1]) for match in names if match)]


def claim(cell: Path, stale_s: float = STALE_S) -> Lease | None:
    """A new lease on a cell that nobody works on; a stale one is broken first. None where it is taken."""
    last = next(reversed(leases(cell)), None)
    if last is not None and last.how == HELD:
        if not last.stale(stale_s):
            return None
        try:
            last.held.rename(last.path / BROKEN)
        except FileNotFoundError:  # its holder ended it, or another broke it
            return None
    lease = Lease(cell, last.number + 1 if last is not None else 1)
    prepared = cell / f".claim-{sha256(repr(me()).encode()).hexdigest()[:12]}"
    (prepared / HELD).mkdir(parents=True, exist_ok=True)
    (prepared / HELD / OWNER_FILE).write_text(json.dumps(asdict(me())), encoding="utf-8")
    try:
        prepared.rename(lease.path)
    except OSError as error:
        shutil.rmtree(prepared)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return None  # another was faster
    return lease


def forgive(cell: Path) -> None:
    """Let failures and broken leases no longer count."""
    for lease in leases(cell):
        if (how := lease.how) in (FAILED, BROKEN):
            (lease.path / how).rename(lease.path / FORGIVEN)


def _sync(directory: Path) -> None:
    """Every file of a run, and the directory itself, to the disk."""
    for each in directory.iterdir():
        with each.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
