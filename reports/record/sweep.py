"""A sweep's directory: the cells of a campaign, one run each.

    DIR/sweep.json           the plan: the cells in the order they run
    DIR/cells/ID/cell.json   what a cell runs; ID is the hash of it
    DIR/cells/ID/result/     its run directory, there as a whole or not at all

Nothing says that a cell is done but a result that verifies.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backbench.errors import ReportError, shown
from backbench.reports.record.schema import RunRecord

SWEEP_FILE = "sweep.json"
SWEEP_VERSION = 1
CELLS = "cells"
CELL_FILE = "cell.json"
RESULT = "result"
MEASURED_FILE = "measured.json"
"""Beside the record in a result."""


def point_name(arm: str, condition: str) -> str:
    """A point by both of its parts; a campaign may leave either empty."""
    return " · ".join(filter(None, (arm, condition)))


@dataclass(frozen=True)
class Cell:
    """One run of a campaign."""

    id: str
    arm: str
    """What of it is compared: "sdpa", or "sdpa · max_seqs 8"."""
    condition: str
    """What the arms of one comparison share: "rate 4"; "" where the whole campaign does."""
    block: int
    """Its arm's repeat. The arms of a condition replay the same requests in a block."""
    seed: int

    @property
    def point(self) -> str:
        """All that tells it from the campaign's others, but its block."""
        return point_name(self.arm, self.condition)


@dataclass(frozen=True)
class Measured:
    """Where a result came from: no name, no path."""

    cell: str
    uuid: str
    """The record's."""
    host: str
    """A hash."""
    code: str
    """Digest of the code that ran."""
    seconds: float
    """The whole process: loading, warm-up, replay and check."""

    @classmethod
    def read(cls, result: Path) -> Measured | None:
        """None where it is not there or is none."""
        try:
            return cls(**json.loads((result / MEASURED_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says."""

    path: Path
    """The directory."""
    name: str
    """The campaign's."""
    repeats: int
    command: str
    """As typed, redacted."""
    cells: tuple[Cell, ...]
    """In the order they run on one machine."""

    def directory(self, cell: Cell) -> Path:
        return self.path / CELLS / cell.id

    def result(self, cell: Cell) -> Path:
        return self.directory(cell) / RESULT

    def write(self) -> None:
        """Write sweep.json; a reader sees the old file or the new one, never a part."""
        content = asdict(self) | {"schema_version": SWEEP_VERSION}
        del content["path"]
        write_json(self.path / SWEEP_FILE, content)


def write_json(file: Path, content: Any) -> None:
    """Replace `file` as a whole."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ReportError(f"Cannot write {file}: {error.strerror}.") from None


def is_sweep(path: Path) -> bool:
    """Whether `path` is a sweep's directory or the file inside it."""
    return path.name == SWEEP_FILE or (path / SWEEP_FILE).is_file()


def read_sweep(path: Path) -> Sweep:
    """The sweep at `path`; raises ReportError where sweep.json cannot be read or is none."""
    directory = path.parent if path.name == SWEEP_FILE else path
    file = directory / SWEEP_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ReportError(f"There is no sweep in {directory}; `bench sweep plan` makes one.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be read: {type(error).__name__}; plan the sweep again.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SWEEP_VERSION:
        raise ReportError(
            f"{file} has schema version {shown(version)}; this Backbench reads {SWEEP_VERSION}."
        )
    try:
        cells = tuple(Cell(**each) for each in data["cells"])
        if odd := next((cell.id for cell in cells if not re.fullmatch("[0-9a-f]{16}", cell.id)), None):
            raise ValueError(f"cell {odd}")
        return Sweep(directory, data["name"], int(data["repeats"]), data["command"], cells)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{file} is no sweep as Backbench writes it ({shown(str(error))}).") from None


def misplaced(result: Path, cell: str, record: RunRecord) -> str | None:
    """Why the run at `result` is not this cell's; None where it is."""
    measured = Measured.read(result)
    if measured is None:
        return f"{MEASURED_FILE} is missing or none"
    if measured.cell != cell:
        return f"it is a run of cell {shown(measured.cell)}"
    if measured.uuid != record.run.get("uuid"):
        return f"{MEASURED_FILE} is another run's"
    return None
