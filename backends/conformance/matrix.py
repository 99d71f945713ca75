"""The result of a conformance check: one row a case, and how to print or store the rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How one case ended."""

    PASS = "pass"
    REFUSED = "refused"
    """The backend said beforehand that it cannot serve the case; `detail` holds its reasons."""
    WRONG = "wrong"
    INHERITED = "inherited"
    """The backend leaves this operation to its base; `detail` names it."""


@dataclass(frozen=True)
class CheckRow:
    """One case of one operation."""

    operation: str
    """"attention", "linear" or "operations"."""
    case: str
    dtype: str
    status: Status
    detail: str = ""
    """Reasons of a refusal, or what was wrong and by how much."""
    error: float | None = None
    """Largest absolute error against the oracle over the case's checks."""
    limit: float | None = None
    """What that error may be at most."""


@dataclass(frozen=True)
class ConformanceMatrix:
    """Every case a backend was put through on one device."""

    backend: str
    device: str
    arch: str
    level: str
    """"quick" or "full"."""
    rows: tuple[CheckRow, ...]

    @property
    def ok(self) -> bool:
        """True when no case is wrong."""
        return not self.wrong

    @property
    def wrong(self) -> tuple[CheckRow, ...]:
        return tuple(row for row in self.rows if row.status is Status.WRONG)

    def counts(self) -> dict[str, int]:
        """Rows of each status."""
        counted = Counter(row.status.value for row in self.rows)
        return {status.value: counted[status.value] for status in Status}

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for `json.dump`."""
        return asdict(self) | {"counts": self.counts(), "rows": [_plain(row) for row in self.rows]}

    def summary(self) -> str:
        """The verdict in one line."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts().items() if count)
        return f"{self.backend} on {self.device} ({self.arch}), {self.level}: {counts}"

    def lines(self) -> Iterable[str]:
        """The matrix as text: the verdict, wrong cases first, refusals grouped by reason, then passes."""
        yield self.summary()
        for row in self.wrong:
            yield f"  WRONG    {row.operation:10} {row.dtype:9} {row.case}: {row.detail}"
        refusals: dict[str, list[CheckRow]] = {}
        for row in self.rows:
            if row.status is Status.REFUSED:
                refusals.setdefault(row.detail, []).append(row)
        for reason, rows in refusals.items():
            names = ", ".join(dict.fromkeys(f"{row.case} [{row.dtype}]" for row in rows[:3]))
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            yield f"  refused  {rows[0].operation:10} {names}{more}: {reason}"
        for row in self.rows:
            if row.status is Status.INHERITED:
                yield f"  base     {row.operation:10} {row.detail}"
        for row in self.rows:
            if row.status is Status.PASS:
                share = f"error {row.error:.2e} of {row.limit:.2e}" if row.limit else "exact"
                yield f"  pass     {row.operation:10} {row.dtype:9} {row.case}: {share}"


def _plain(row: CheckRow) -> dict[str, Any]:
    return asdict(row) | {"status": row.status.value}
