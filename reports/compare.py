"""Which runs may be compared, what differs between them, and their ratios."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import QUANTITIES, format_ratio, read
from backbench.reports.record import RunRecord

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


UNNAMED = ("backend", "model", "workload", "seed", "repeat", "out")
"""Options that a label says otherwise, or that name nothing about the configuration."""


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
    """The 95 % interval between runs; None where the runs are too few for one."""
    verdict: str
    """"better", "worse", "same" (the interval holds 1), "unclear" (the runs allow no verdict), or ""
    (no ratio, or neither way is better)."""
    n: int = 0
    """Pairs of runs in the interval, or runs of the smaller arm."""

    def __str__(self) -> str:
        if self.value is None:
            return ""
        word = f" {self.verdict}" if self.verdict in ("better", "worse") else ""
        return self.text + (f" ({self.interval})" if self.interval else "") + word

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

    `backend.portability` and the bytes of `backend.linears` are left out: they configure nothing.
    """
    if name == "backend.portability" or (name.startswith("backend.linears.") and name.endswith("_bytes")):
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
    """A short distinct name for each record: its backend, and as much more as it takes.

    Runs of one configuration are told apart by when they ran.
    """
    parts = [[backend_name(record)] for record in records]
    for texts in _told_apart(records):
        names = [" · ".join(part) for part in parts]
        if len(set(names)) == len(names):
            return names
        if len(set(texts)) > 1:
            for part, text in zip(parts, texts, strict=True):
                part.append(text)
    names = [" · ".join(part) for part in parts]
    return [
        name if names.count(name) == 1 else f"{name} · run {names[:place].count(name) + 1}"
        for place, name in enumerate(names)
    ]


def _told_apart(records: Sequence[RunRecord]) -> Iterator[list[str]]:
    """Texts that may tell the records apart, the most telling first."""
    for path in ("model.quantization", "model.name", "workload.name"):
        yield [show(_at(record, path))[:32] for record in records]
    asked = [record.run.get("asked") or {} for record in records]
    for name in dict.fromkeys(name for each in asked for name in each):
        if name not in UNNAMED and any(each.get(name) != asked[0].get(name) for each in asked):
            yield [_option_text(name, each.get(name))[:32] for each in asked]
    for path in ("system.device.name", "software.git_sha", "run.seed", "run.utc"):
        yield [show(_at(record, path))[:32] for record in records]
    yield []


def _option_text(name: str, value: Any) -> str:
    """An option as a label says it: "max_seqs 64", "no graphs"."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"default {name}" if value is None else f"{name} {show(value)}"


def backend_name(record: RunRecord) -> str:
    """The backend asked for by name, else the one that attention ran on."""
    asked = record.backend.get("asked")
    used = record.backend.get("used") or {}
    return str(used.get("attention") or "unknown backend") if asked in (None, "auto") else str(asked)


def compared(records: Sequence[RunRecord]) -> list[Quantity]:
    """The quantities that at least one record has."""
    return [each for each in QUANTITIES if any(read(record, each).value is not None for record in records)]


def _at(record: RunRecord, path: str) -> Any:
    section, *keys = path.split(".")
    found: Any = getattr(record, section)
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
