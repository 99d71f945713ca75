"""Which runs may be compared, what differs between them, and their ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from backbench.errors import ReportError
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import QUANTITIES, Reading, format_ratio, read
from backbench.reports.record import RunRecord

if TYPE_CHECKING:
    import pandas as pd

HARD_FIELDS: tuple[tuple[str, str], ...] = (
    ("schema_version", "record schema"),
    ("metrics.schema", "metric schema"),
    ("workload.content_hash", "workload"),
    ("model.name", "model"),
    ("model.config_hash", "model config"),
    ("model.dtype", "model dtype"),
    ("metrics.counts.intended", "requests"),
    ("metrics.prompt_tokens", "prompt tokens"),
    ("metrics.output_tokens", "output tokens"),
)
"""Two records compare only when all of these agree."""

CONFIGURATION = ("workload", "model", "engine", "backend", "system", "software", "warmup")
"""The sections that say what was run, as opposed to what came out of it."""


@dataclass(frozen=True)
class Difference:
    """One field that is not the same in every record."""

    field: str
    values: tuple[Any, ...]
    """One a record; None where a record lacks the field."""

    def __str__(self) -> str:
        return f"{self.field}: " + " vs ".join(_short(show(value)) for value in self.values)


@dataclass(frozen=True)
class Ratio:
    """A quantity of a candidate over the reference's."""

    value: float | None
    low: float | None
    high: float | None
    """From both runs' intervals, taken at their far ends (so it covers at least as often as they do)."""
    verdict: str
    """"better", "worse", "same" (the interval holds 1), "unclear" (no interval), or "" (no ratio)."""

    def __str__(self) -> str:
        if self.value is None:
            return ""
        return self.text + (f" ({self.interval})" if self.interval else "")

    @property
    def text(self) -> str:
        """ "1.12×"; three decimals close to 1; empty without a value."""
        return "" if self.value is None else format_ratio(self.value, self._decimals)

    @property
    def interval(self) -> str:
        """ "1.08–1.16"; empty without one."""
        if self.low is None or self.high is None:
            return ""
        return "–".join(format_ratio(end, self._decimals).rstrip("×") for end in (self.low, self.high))

    @property
    def _decimals(self) -> int:
        return 3 if self.value is not None and 0 < abs(self.value - 1) < 0.02 else 2


def incomparable(records: Sequence[RunRecord]) -> list[Difference]:
    """The hard fields that differ, by name; empty means that the records may be compared."""
    found = []
    for path, name in HARD_FIELDS:
        values = tuple(_at(record, path) for record in records)
        if any(value != values[0] for value in values):
            found.append(Difference(name, values))
    return found


def require_comparable(records: Sequence[RunRecord]) -> None:
    """Raises:
    ReportError: fewer than two records, or hard fields differ; the message names them all.
    """
    if len(records) < 2:
        raise ReportError("A comparison needs at least two runs.")
    if found := incomparable(records):
        raise ReportError("These runs do not compare: " + "; ".join(map(str, found)) + ".")


def differences(records: Sequence[RunRecord]) -> list[Difference]:
    """Every configuration field that is not the same in all records, in the record's order."""
    flat = [dict(configuration(record)) for record in records]
    names = list(dict.fromkeys(name for each in flat for name in each))
    rows = [Difference(name, tuple(each.get(name) for each in flat)) for name in names]
    return [row for row in rows if any(value != row.values[0] for value in row.values)]


def configuration(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf that says what was run."""
    yield "run.command", record.run.get("command")
    yield "run.seed", record.run.get("seed")
    yield "run.status", record.run.get("status")
    for section in CONFIGURATION:
        yield from flatten(getattr(record, section), section)


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) pairs; lists are leaves unless they hold objects; an empty object has none.

    `backend.portability` is left out: it has a table of its own and configures nothing.
    """
    if name == "backend.portability":
        return
    if isinstance(value, dict):
        for key in sorted(value):
            yield from flatten(value[key], f"{name}.{key}")
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        for index, each in enumerate(value):
            yield from flatten(each, f"{name}[{index}]")
    else:
        yield name, value


def show(value: Any) -> str:
    """A configuration value as a reader sees it."""
    if value is None or value == {} or value == []:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return ", ".join(value)
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _short(text: str) -> str:
    """Short enough for several in one line; two hashes differ in their first characters."""
    return text if len(text) <= 20 else text[:17] + "..."


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A short distinct name for each record: its backend, and as much more as it takes."""
    candidates = (
        "model.quantization",
        "model.name",
        "workload.name",
        "system.device.name",
        "software.git_sha",
        "run.seed",
    )
    parts = [[backend_name(record)] for record in records]
    for path in candidates:
        names = [" · ".join(part) for part in parts]
        if len(set(names)) == len(names):
            return names
        texts = [show(_at(record, path))[:32] for record in records]
        if len(set(texts)) > 1:
            for part, text in zip(parts, texts, strict=True):
                part.append(text)
    names = [" · ".join(part) for part in parts]
    return [name if names.count(name) == 1 else f"{name} #{place + 1}" for place, name in enumerate(names)]


def backend_name(record: RunRecord) -> str:
    """The backend asked for by name, else the one that attention ran on."""
    asked = record.backend.get("asked")
    used = record.backend.get("used") or {}
    return str(used.get("attention") or "unknown backend") if asked in (None, "auto") else str(asked)


def ratio(reference: Reading, candidate: Reading, higher_is_better: bool | None) -> Ratio:
    """candidate / reference, with the widest interval that both readings' intervals allow."""
    if not reference.value or candidate.value is None:
        return Ratio(None, None, None, "")
    value = candidate.value / reference.value
    low = high = None
    if candidate.low is not None and candidate.high is not None and reference.low and reference.high:
        low, high = candidate.low / reference.high, candidate.high / reference.low
    if higher_is_better is None:
        verdict = ""
    elif value == 1 or (low is not None and high is not None and low <= 1 <= high):
        verdict = "same"
    elif low is None:
        verdict = "unclear"
    else:
        verdict = "better" if (value > 1) == higher_is_better else "worse"
    return Ratio(value, low, high, verdict)


def compared(records: Sequence[RunRecord]) -> list[Quantity]:
    """The quantities that at least one record has."""
    return [each for each in QUANTITIES if any(read(record, each).value is not None for record in records)]


def ratio_table(records: Sequence[RunRecord]) -> pd.DataFrame:
    """One row a quantity: unit, which way is better, every run's raw value, and the ratios to the first.

    Columns: metric, unit, better ("higher" | "lower" | ""), then for each run its label, and for each
    run after the first "<label> / <first label>" with the ratio.
    """
    import pandas as pd

    names = labels(records)
    rows = []
    for each in compared(records):
        readings = [read(record, each) for record in records]
        better = {True: "higher", False: "lower", None: ""}[each.higher_is_better]
        row: dict[str, Any] = {"metric": each.label, "unit": each.unit, "better": better}
        row |= {name: reading.value for name, reading in zip(names, readings, strict=True)}
        for name, reading in zip(names[1:], readings[1:], strict=True):
            row[f"{name} / {names[0]}"] = ratio(readings[0], reading, each.higher_is_better).value
        rows.append(row)
    return pd.DataFrame(rows)


def _at(record: RunRecord, path: str) -> Any:
    section, *keys = path.split(".")
    found: Any = getattr(record, section)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
