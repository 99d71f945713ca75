"""What one metric is: its place in the record, its words, and how it follows from a run's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from backbench.reports.metrics.run import RunTables


@dataclass(frozen=True)
class Missing:
    """What a metric computes where a run has no value: a null in the record, with its reason beside it."""

    reason: str


ABSENT = "absent"
"""The key of a section that says why its nulls are null: dotted path inside the section -> reason."""


def resolved(section: dict[str, Any]) -> dict[str, Any]:
    """The section with a null for every `Missing` in it, and its reason under `ABSENT`."""
    reasons: dict[str, str] = dict(section.get(ABSENT) or {})

    def plain(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, Missing):
            reasons[".".join(path)] = value.reason
            return None
        if isinstance(value, dict):
            return {key: plain(each, (*path, str(key))) for key, each in value.items()}
        return value

    found: dict[str, Any] = plain({key: each for key, each in section.items() if key != ABSENT}, ())
    return found | ({ABSENT: reasons} if reasons else {})


@dataclass(frozen=True)
class Part:
    """One number inside a metric's value that tables and comparisons show."""

    key: str = ""
    """Its key in the value, e.g. "p50"; empty = the value itself."""
    label: str = ""
    """Follows the metric's own label."""
    headline: bool = False
    """Shown in the scorecard of several runs."""
    summary: bool = False
    """Shown at the end of a run."""


@dataclass(frozen=True)
class Quantity:
    """One number that a reader compares: a part of a metric."""

    path: tuple[str, ...]
    """Section and keys, e.g. ("metrics", "ttft_s", "p50")."""
    label: str
    unit: str
    higher_is_better: bool | None
    group: str
    headline: bool = False
    summary: bool = False
    definition: str = ""


def always(run: RunTables) -> bool:
    """Whatever the run."""
    return True


@dataclass(frozen=True)
class Metric:
    """One metric's only definition: the record, the tables, `compare`, `verify` and the page follow it."""

    path: tuple[str, ...]
    """Section and keys in the record, e.g. ("metrics", "ttft_s")."""
    label: str
    unit: str
    """What `format_value` knows: "s", "bytes", "tok/s", "tok/s/user", "req/s", "J/token", "ratio", ..."""
    higher_is_better: bool | None
    """None where neither direction is better."""
    definition: str
    """One sentence."""
    compute: Callable[[RunTables], Any] | None
    """The value from the tables, or `Missing`; None = measured by the harness, and no table has it."""
    group: str = ""
    """The table it is shown in."""
    name: str = ""
    """The label in full, where there is room for it."""
    parts: tuple[Part, ...] = (Part(),)
    """What is shown of it; empty = it stands in the record alone."""
    since: int = 1
    """The metric schema in which the definition last changed."""
    changed: tuple[str, ...] = ()
    """The keys of the value whose definition changed then; empty = the whole value."""
    changes: Callable[[RunTables], bool] = always
    """Whether that change can show in this run; where it cannot, an older record is recomputed too."""
    later: bool = False
    """Added within a metric schema, so that older records of the same schema lack it."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    def quantities(self) -> Iterator[Quantity]:
        """The numbers that tables and comparisons show."""
        for part in self.parts:
            yield Quantity(
                self.path + ((part.key,) if part.key else ()),
                f"{self.label}{part.label}",
                self.unit,
                self.higher_is_better,
                self.group,
                part.headline,
                part.summary,
                self.definition,
            )
