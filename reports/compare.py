"""Which runs may be compared, what differs between them, and their ratios."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
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
    ("speculation.synthetic", "drawn acceptance"),
)
"""Two records compare only when all of these agree."""

CONFIGURATION = ("workload", "model", "engine", "backend", "system", "software", "warmup")
"""The sections that say what was run, as opposed to what came out of it."""


HASH = re.compile(r"[0-9a-f]{40,}")
HASH_SHOWN = 12
"""Characters of a hash that a reader sees; two that differ do so in the first ones."""
LONGEST_NAME = 48
"""Characters of a part of a name."""
UNNAMED = ("backend", "model", "workload", "seed", "repeat", "out", "check", "quantize")
"""Options that a label says otherwise, or that name nothing about the configuration."""


@dataclass(frozen=True)
class Difference:
    """One field that is not the same in every record."""

    field: str
    values: tuple[Any, ...]
    """One a record; None where a record lacks the field."""

    def __str__(self) -> str:
        return f"{self.field}: " + " vs ".join(_short(brief(value)) for value in self.values)


@dataclass(frozen=True)
class Ratio:
    """A quantity of a candidate over the reference's."""

    value: float | None
    low: float | None
    high: float | None
    """The 95 % interval between runs; None where the runs are too few for one."""
    verdict: str
    """"better", "worse", "same" (no further apart than equal arms may be), "unclear" (the runs allow no
    verdict, or only a quantity looked at alone would have one), or "" (no ratio, neither way is better)."""
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
    found = {row.field: row for row in rows if any(value != row.values[0] for value in row.values)}
    return [row for row in found.values() if not _follows(row.field, found)]


def _follows(field: str, found: Mapping[str, Difference]) -> bool:
    """Whether it only says once more what another difference does: another backend has other sources."""
    before, hashed, operation = field.partition("kernel_source_hash.")
    return bool(hashed) and f"{before}used.{operation}" in found


def configuration(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf that says what was run; how long it took to warm up is none."""
    yield "run.command", record.run.get("command")
    yield "run.seed", record.run.get("seed")
    yield "run.status", record.run.get("status")
    yield from flatten(record.run.get("tags") or {}, "run.tags")
    for section in CONFIGURATION:
        leaves = flatten(getattr(record, section), section)
        yield from (leaf for leaf in leaves if leaf[0] != "warmup.seconds")


def flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) pairs; lists are leaves unless they hold objects; an empty object has none.

    `backend.portability` and of `backend.linears` bytes and what was measured are left out: they configure
    nothing.
    """
    measured = name.endswith(("_bytes", "_rows", ".served_beyond"))
    if name == "backend.portability" or (name.startswith("backend.linears.") and measured):
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


def brief(value: Any) -> str:
    """`show`, with as much of a hash as tells it from others."""
    text = show(value)
    return text[:HASH_SHOWN] if HASH.fullmatch(text) else text


def _short(text: str) -> str:
    """Short enough for several in one line; two hashes differ in their first characters."""
    return text if len(text) <= 20 else text[:17] + "..."


def labels(records: Sequence[RunRecord]) -> list[str]:
    """A short distinct name for each record: its user's label, else what differs between them and no more.

    Options that differ are named though the backends tell the records apart already: a name that hides one
    would credit the backend. Runs of one configuration are told apart by when they ran.
    """
    own = [own_label(record)[:LONGEST_NAME] for record in records]
    if all(own) and len(set(own)) == len(own):
        return own
    backends = [backend_name(record)[:LONGEST_NAME] for record in records]
    names = _with([""] * len(records), own)
    for texts in (backends, *_texts_of(records, ("model.quantization", "model.name", "workload.name"))):
        names = _with(names, texts)
    if len(set(options := _options_texts(records))) > 1:
        names = _joined(names, options)
    names = [name or backend for name, backend in zip(names, backends, strict=True)]
    others = ("system.device.name", "software.git_sha", "run.seed", "run.utc")
    for texts in _texts_of(records, others):
        names = _with(names, texts)
    return _numbered(names)


def own_label(record: RunRecord) -> str:
    """What its user called the run (--label); empty where nothing."""
    return str(record.run.get("label") or "")


def _with(names: list[str], texts: list[str]) -> list[str]:
    """The names with these texts, where they tell any two of one name apart."""
    return _joined(names, texts) if len(set(zip(names, texts, strict=True))) > len(set(names)) else names


def _joined(names: list[str], texts: list[str]) -> list[str]:
    return [" · ".join(filter(None, each)) for each in zip(names, texts, strict=True)]


def _numbered(names: list[str]) -> list[str]:
    """Distinct ones: those that several share end in a number."""
    total, number = Counter(names), Counter[str]()
    found = []
    for name in names:
        told = name
        while total[told] > 1 or (told != name and told in total):
            number[name] += 1
            told = f"{name} · run {number[name]}"
        found.append(told)
    return found


def _texts_of(records: Sequence[RunRecord], paths: Sequence[str]) -> Iterator[list[str]]:
    for path in paths:
        absent = "not quantized" if path == "model.quantization" else None
        yield [brief(_at(record, path) or absent)[:LONGEST_NAME] for record in records]


def _options_texts(records: Sequence[RunRecord]) -> list[str]:
    """Every record's values of the options that are not the same in all of them."""
    options = [named_options(record) for record in records]
    names = dict.fromkeys(name for each in options for name in each)
    differing = [name for name in names if any(each.get(name) != options[0].get(name) for each in options)]
    return [
        " · ".join(_option_text(name, each.get(name))[:LONGEST_NAME] for name in differing)
        for each in options
    ]


def named_options(record: RunRecord) -> dict[str, Any]:
    """The options that were asked for and are part of a configuration's name."""
    asked = record.run.get("asked") or {}
    return {name: value for name, value in asked.items() if name not in UNNAMED}


def configured(record: RunRecord) -> dict[str, Any]:
    """What was measured with which options, on whichever machine: what the runs of one sample share."""
    return {
        "backend": backend_name(record),
        "model": record.model.get("name"),
        "quantization": record.model.get("quantization"),
        "workload": record.workload.get("name"),
    } | named_options(record)


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
