"""The record as tables: what the command line prints, and what Markdown and CSV export."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

from backbench.reports.compare import Difference, Ratio, compared, labels, ratio, show
from backbench.reports.metrics import latency
from backbench.reports.quantities import (
    DASH,
    QUANTITIES,
    Reading,
    format_interval,
    format_value,
    read,
)
from backbench.reports.record import RunRecord


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, and the number it says it about."""

    value: str
    interval: str = ""
    ratio: str = ""
    """To the first run, with its interval."""
    verdict: str = ""
    """The ratio's verdict: "better", "worse", "same", "unclear" or ""."""
    note: str = ""
    """Why there is no value."""
    sort: float | str | None = None
    """What the cell sorts by: the number in the record's own unit, or a text."""

    def __str__(self) -> str:
        interval = f" ({self.interval})" if self.interval else ""
        return self.value + interval + (f" · {self.ratio}" if self.ratio else "")


@dataclass(frozen=True)
class Table:
    """A titled table. The first column names the row."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def texts(self) -> list[tuple[str, ...]]:
        """Every row as plain text."""
        return [tuple(map(str, row)) for row in self.rows]


@dataclass(frozen=True)
class Line:
    """One line of a run's summary."""

    group: str
    label: str
    value: str
    """With its unit."""
    interval: str
    """95 % interval in the value's unit; empty when there is none."""
    note: str = ""
    """Why there is no value."""


def summary_rows(record: RunRecord) -> list[Line]:
    """The short table at the end of a run. Quantities that cannot exist here (no SLO, no power meter)
    are left out; percentiles that the sample is too small for stay, with the reason."""
    lines = []
    for each in QUANTITIES:
        if not each.summary:
            continue
        reading = read(record, each)
        too_small = "sample size" in (reading.reason or "")
        if reading.value is None and not too_small:
            continue
        lines.append(
            Line(
                each.group,
                each.label,
                format_value(reading.value, each.unit),
                format_interval(reading, each.unit),
                reading.reason or "",
            )
        )
    return lines


def summary_table(record: RunRecord) -> Table:
    """`summary_rows` as a table."""
    lines = summary_rows(record)
    rows = tuple(_texts(line.label, line.value, line.interval or line.note or DASH) for line in lines)
    return Table("Summary", ("Metric", "Value", "95 % interval"), rows)


def latency_table(records: Sequence[RunRecord]) -> Table:
    """Every latency's mean and percentiles; with several records one row a latency and run."""
    names = labels(records)
    several = len(records) > 1
    rows = []
    for metric in latency.METRICS:
        name, short, key = metric.name, metric.label, metric.path[-1]
        for label, record in zip(names, records, strict=True):
            readings = [read(record, each) for each in metric.quantities()]
            if all(reading.value is None for reading in readings):
                continue
            head = _texts(short if short == name else f"{name} ({short})", *((label,) if several else ()))
            count = _count(record, key)
            rows.append((*head, *(_cell(each, "s") for each in readings), Cell(f"{count:,}", sort=count)))
    columns = ("Latency", *(("Run",) if several else ()), "Mean", *latency.STATISTICS[1:], "Samples")
    return Table("Latency", columns, tuple(rows))


def scorecard_table(records: Sequence[RunRecord], with_ratios: bool = True) -> Table:
    """One row a run, one column a headline quantity; each cell the value, its interval, and the ratio to
    the first run."""
    wanted = [each for each in compared(records) if each.headline]
    if any(each.path[-1] == "steady_state" for each in wanted):
        wanted = [each for each in wanted if each.path[-1] != "whole_run"]
    rows = []
    for place, (name, record) in enumerate(zip(labels(records), records, strict=True)):
        cells = [Cell(name, sort=name)]
        for each in wanted:
            reading = read(record, each)
            against = ratio(read(records[0], each), reading, each.higher_is_better)
            shown = with_ratios and place > 0
            cells.append(_cell(reading, each.unit, against if shown else None))
        rows.append(tuple(cells))
    return Table("Scorecard", ("Run", *(each.label for each in wanted)), tuple(rows))


def quantity_tables(record: RunRecord) -> list[Table]:
    """One run's quantities but those with a table of their own (latencies, decode fit, correctness)."""
    tables = []
    for title, groups in (
        ("Throughput", ("Throughput",)),
        ("Memory", ("Memory",)),
        ("Efficiency and load", ("Energy", "Roofline", "Steps", "Prefix cache", "Schedule")),
    ):
        rows = []
        for each in compared([record]):
            if each.group in groups and "decode_fit" not in each.path:
                better = {True: "higher", False: "lower", None: DASH}[each.higher_is_better]
                rows.append((*_texts(each.label), _cell(read(record, each), each.unit), *_texts(better)))
        if rows:
            tables.append(Table(title, ("Metric", "Value", "Better"), tuple(rows)))
    return tables


def comparison_table(
    records: Sequence[RunRecord], headline_only: bool = False, with_ratios: bool = True
) -> Table:
    """One row a quantity, one column a run, and the ratio of each run after the first to the first."""
    names = labels(records)
    rows = []
    for each in compared(records):
        if headline_only and not each.headline:
            continue
        readings = [read(record, each) for record in records]
        cells = [*_texts(each.label), *(_cell(reading, each.unit) for reading in readings)]
        for reading in readings[1:] if with_ratios else []:
            found = ratio(readings[0], reading, each.higher_is_better)
            cells.append(Cell(str(found) or DASH, verdict=found.verdict, sort=found.value))
        better = {True: "higher", False: "lower", None: DASH}[each.higher_is_better]
        rows.append((*cells, *_texts(better)))
    ratio_names = [f"{name} / {names[0]}" for name in names[1:]] if with_ratios else []
    return Table("Comparison", ("Metric", *names, *ratio_names, "Better"), tuple(rows))


def difference_table(found: Sequence[Difference], names: Sequence[str]) -> Table:
    """The differing fields side by side."""
    rows = tuple(_texts(each.field, *(show(value) for value in each.values)) for each in found)
    return Table("What differs", ("Field", *names), rows)


def full_table(records: Sequence[RunRecord]) -> Table:
    """Every quantity of every record, unscaled, for CSV: one row a quantity and run."""
    rows = []
    for name, record in zip(labels(records), records, strict=True):
        for each in QUANTITIES:
            reading = read(record, each)
            numbers = (reading.value, reading.low, reading.high)
            texts = ("" if number is None else repr(float(number)) for number in numbers)
            rows.append(_texts(name, ".".join(each.path), each.unit, *texts, reading.reason or ""))
    return Table("Quantities", ("run", "quantity", "unit", "value", "low", "high", "reason"), tuple(rows))


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table with its title as a heading."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join([" --- ", *(" ---: " for _ in table.columns[1:])]) + "|"
    return "\n".join([f"### {table.title}", "", row(table.columns), rule, *map(row, table.texts())]) + "\n"


def to_csv(table: Table) -> str:
    """Comma-separated values with a header line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows(table.texts())
    return buffer.getvalue()


def _texts(*texts: str) -> tuple[Cell, ...]:
    return tuple(Cell(text, sort=text) for text in texts)


def _cell(reading: Reading, unit: str, against: Ratio | None = None) -> Cell:
    value, interval = format_value(reading.value, unit), format_interval(reading, unit)
    ratio_text, verdict = (str(against), against.verdict) if against is not None else ("", "")
    note = (reading.reason or "").removeprefix("not supported at this sample size: ")
    return Cell(value, interval, ratio_text, verdict, note, reading.value)


def _count(record: RunRecord, key: str) -> int:
    section = record.metrics.get(key)
    return int(section.get("count") or 0) if isinstance(section, dict) else 0
