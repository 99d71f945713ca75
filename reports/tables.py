"""The record as tables: what the command line prints, and what Markdown and CSV export."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from backbench.reports.arms import Arm, compared_in, measured
from backbench.reports.compare import Difference, Ratio, brief, compared, labels, show
from backbench.reports.metrics import latency
from backbench.reports.metrics.metric import Quantity
from backbench.reports.quantities import (
    DASH,
    QUANTITIES,
    Reading,
    digits,
    format_interval,
    format_value,
    quantity,
    read,
)
from backbench.reports.ratios import ratios
from backbench.reports.record import RunRecord


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, and the number it says it about."""

    value: str
    interval: str = ""
    ratio: str = ""
    """To the first arm, with its interval between runs."""
    verdict: str = ""
    """The ratio's verdict: "better", "worse", "same", "unclear" or ""."""
    note: str = ""
    """Why there is no value, or what it is of."""
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
    """Why there is no value, or which stretch of the run it is about."""


BESIDE_DRAFTS = (("metrics", "icl_s", "p50"), ("metrics", "icl_s", "p99"))
"""Also at the end of a run that drafts: its tokens come several at once, and ITL hides the wait for them."""


def summary_rows(record: RunRecord) -> list[Line]:
    """The short table at the end of a run. Quantities that cannot exist here (no SLO, no power meter)
    are left out; percentiles that the sample is too small for, and a steady state that there was not, stay
    with the reason."""
    lines = []
    for each in QUANTITIES:
        if not each.summary and not (record.speculation and each.path in BESIDE_DRAFTS):
            continue
        reading = read(record, each)
        stands = "sample size" in (reading.reason or "") or each.path[-1] == "steady_state"
        if reading.value is None and not stands:
            continue
        lines.append(
            Line(
                each.group,
                each.label,
                format_value(reading.value, each.unit),
                format_interval(reading, each.unit),
                reading.reason or stretch(record, each.path[-1]),
            )
        )
    return lines


def stretch(record: RunRecord, name: str) -> str:
    """The stretch of a run that a rate is about: from when to when, and the requests that finished in it."""
    found = record.metrics.get(name) if name in ("steady_state", "whole_run") else None
    if not isinstance(found, dict) or found.get("start_s") is None:
        return ""
    requests = f", {found['requests']:,} requests" if found.get("requests") else ""
    return f"from {digits(found['start_s'])} to {digits(found['end_s'])} s{requests}"


def clipping(record: RunRecord) -> str:
    """What was cut off the requests so that they fit the context; empty where nothing was."""
    parameters = record.workload.get("parameters") or {}
    for each in parameters.get("transformations") or []:
        if each.get("kind") == "clip" and each.get("requests"):
            return (
                f"{each['requests']:,} of {parameters['num_requests']:,} requests shortened to "
                f"{each['max_len']:,} tokens: {each['input_tokens']:,} prompt and "
                f"{each['output_tokens']:,} output tokens were cut off"
            )
    return ""


def summary_table(record: RunRecord) -> Table:
    """`summary_rows` as a table."""
    lines = summary_rows(record)
    rows = tuple(_texts(line.label, line.value, line.interval or line.note or DASH) for line in lines)
    return Table("Summary", ("Metric", "Value", "95 % within this run, or a note"), rows)


def latency_table(records: Sequence[RunRecord], names: Sequence[str] | None = None) -> Table:
    """Every latency's mean and percentiles; with several records one row a latency and run."""
    names = labels(records) if names is None else names
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
    return Table("Latency, with 95 % intervals within each run", columns, tuple(rows))


def scorecard_table(arms: Sequence[Arm], with_ratios: bool = True) -> Table:
    """One row an arm, one column a headline quantity; each cell the value, its interval, and the ratio to
    the first arm."""
    wanted = headlines(arms)
    rows = []
    for place, arm in enumerate(arms):
        cells = [Cell(arm.label, sort=arm.label)]
        found = ratios(arms[0], arm, wanted) if with_ratios and place > 0 else {}
        cells += [_cell(measured(arm, each), each.unit, found.get(each)) for each in wanted]
        rows.append(tuple(cells))
    return Table("Scorecard", ("Run", *(each.label for each in wanted)), tuple(rows))


def headlines(arms: Sequence[Arm]) -> list[Quantity]:
    """The headline quantities that the arms have; the whole run's rate only where no steady one stands."""
    wanted = [each for each in compared_in(arms) if each.headline]
    if any(each.path[-1] == "steady_state" for each in wanted):
        wanted = [each for each in wanted if each.path[-1] != "whole_run"]
    return wanted


def repeats_table(arms: Sequence[Arm]) -> Table:
    """Every headline quantity of arms of several runs: median, interval between runs, and the spread."""
    rows = []
    several = len(arms) > 1
    for each in compared_in(arms):
        if not (each.headline or each.summary):
            continue
        for arm in arms:
            values = sorted(arm.values(each).values())
            if not values:
                continue
            reading = Reading(values[0]) if len(values) == 1 else measured(arm, each)
            ends = dict.fromkeys(format_value(end, each.unit) for end in (values[0], values[-1]))
            head = (each.label, *((arm.label,) if several else ()))
            spread = _texts(format_interval(reading, each.unit) or DASH, " to ".join(ends), f"{len(values)}")
            rows.append((*_texts(*head), Cell(format_value(reading.value, each.unit)), *spread))
    columns = (
        "Metric",
        *(("Arm",) if several else ()),
        "Median",
        "95 % between runs",
        "Least to most",
        "Runs",
    )
    return Table("Runs of each arm", columns, tuple(rows))


EFFICIENCY = ("Energy", "Roofline", "Steps", "Prefix cache", "Schedule", "Fidelity", "Machine")


def quantity_tables(record: RunRecord) -> list[Table]:
    """One run's quantities but those with a table of their own (latencies, decode fit, correctness)."""
    tables = []
    for title, groups in (
        ("Throughput", ("Throughput",)),
        ("Memory", ("Memory",)),
        ("Efficiency and load", EFFICIENCY),
    ):
        rows = []
        for each in compared([record]):
            if each.group in groups and "decode_fit" not in each.path:
                better = {True: "higher", False: "lower", None: DASH}[each.higher_is_better]
                rows.append((*_texts(each.label), _cell(read(record, each), each.unit), *_texts(better)))
        if rows:
            tables.append(Table(title, ("Metric", "Value", "Better"), tuple(rows)))
    return tables


QUANTIZED = (
    ("memory", "weights_bytes"),
    ("memory", "weights_read_bytes"),
    ("metrics", "output_tokens_per_s", "whole_run"),
    ("metrics", "tpot_s", "p50"),
    ("roofline", "decode_fit", "intercept_s"),
    ("roofline", "decode_fit", "slope_s_per_token"),
    ("roofline", "mbu"),
    ("energy", "joules_per_output_token"),
    ("accuracy", "perplexity_change"),
    ("accuracy", "kl_divergence"),
    ("accuracy", "top1_unchanged"),
)
"""What shows whether quantized weights are smaller and faster, and how much worse."""


def quantization_table(arms: Sequence[Arm]) -> Table | None:
    """One row an arm: how it keeps the weights and what that is worth; None where all keep them alike."""
    kept = [show(arm.runs[0].record.model.get("quantization")) for arm in arms]
    if len(set(kept)) < 2:
        return None
    wanted = [quantity(*path) for path in QUANTIZED]
    wanted = [each for each in wanted if any(arm.values(each) for arm in arms)]
    faster = [faster_up_to(arm.runs[0].record) for arm in arms]
    timed = any(cell.sort is not None for cell in faster)
    rows = []
    for arm, scheme, rows_faster in zip(arms, kept, faster, strict=True):
        cells = (_cell(measured(arm, each), each.unit) for each in wanted)
        rows.append((*_texts(arm.label, scheme), *((rows_faster,) if timed else ()), *cells))
    head = ("Arm", "Scheme", *(("Faster up to",) if timed else ()))
    return Table("Quantized weights", (*head, *(each.label for each in wanted)), tuple(rows))


def faster_up_to(record: RunRecord) -> Cell:
    """Rows of a product up to which all quantized weights are faster than dense ones would be; as a note the
    role that ends it, and what serves that from there on. All from `backend.linears`."""
    linears = record.backend.get("linears") or {}
    quantized = {role: row for role, row in linears.items() if row.get("scheme", "none") != "none"}
    if not quantized:
        return Cell(DASH)
    known = {role: row.get("faster_than_dense_up_to_rows") for role, row in quantized.items()}
    if missing := [role for role, rows in known.items() if rows is None]:
        return Cell("not measured", note=", ".join(missing) if len(missing) < len(known) else "")
    rows, role = min((rows, role) for role, rows in known.items())
    beyond = quantized[role].get("served_beyond")
    return Cell(f"{rows} rows", note=f"{role}; then {beyond or 'not measured'}", sort=rows)


def comparison_table(
    arms: Sequence[Arm], headline_only: bool = False, with_ratios: bool = True, comparable: bool = True
) -> Table:
    """One row a quantity, one column an arm, and the ratio of each arm after the first to the first.

    Ratios of arms that do not compare have no verdict, and the title says so.
    """
    rows = []
    wanted = [each for each in compared_in(arms) if each.headline or not headline_only]
    judged = [ratios(arms[0], arm, wanted) for arm in arms[1:]] if with_ratios else []
    for each in wanted:
        cells = [*_texts(each.label), *(_cell(measured(arm, each), each.unit) for arm in arms)]
        for of_arm in judged:
            found = of_arm[each] if comparable else replace(of_arm[each], verdict="")
            cells.append(Cell(str(found) or DASH, verdict=found.verdict, sort=found.value))
        better = {True: "higher", False: "lower", None: DASH}[each.higher_is_better]
        rows.append((*cells, *_texts(better)))
    names = [arm.label for arm in arms]
    ratio_names = [f"{name} / {names[0]}" for name in names[1:]] if with_ratios else []
    what = "Comparison" if comparable else "NOT COMPARABLE"
    title = f"{what}. {interval_note(arms)}"
    return Table(title, ("Metric", *names, *ratio_names, "Better"), tuple(rows))


def interval_note(arms: Sequence[Arm]) -> str:
    """What the intervals of a comparison's values are."""
    single, several = (any((len(arm.runs) > 1) == more for arm in arms) for more in (False, True))
    if single and several:
        return "95 % intervals between runs; of an arm of one run, within that run."
    return (
        "Medians of runs with 95 % intervals between runs." if several else "95 % intervals within each run."
    )


def difference_table(found: Sequence[Difference], names: Sequence[str]) -> Table:
    """The differing fields side by side."""
    rows = tuple(_texts(each.field, *(brief(value) for value in each.values)) for each in found)
    return Table("What differs", ("Field", *names), rows)


def full_table(arms: Sequence[Arm]) -> Table:
    """Every quantity of every run, unscaled, for CSV: one row a quantity and run."""
    rows = []
    for arm in arms:
        for number, run in enumerate(arm.runs, 1):
            name = arm.label if len(arm.runs) == 1 else f"{arm.label}, run {number}"
            for each in QUANTITIES:
                reading = read(run.record, each)
                numbers = (reading.value, reading.low, reading.high)
                texts = ("" if number is None else repr(float(number)) for number in numbers)
                rows.append(_texts(name, ".".join(each.path), each.unit, *texts, reading.reason or ""))
    return Table("Quantities", ("run", "quantity", "unit", "value", "low", "high", "reason"), tuple(rows))


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured Markdown table with its title as a heading."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_text, cells)) + " |"

    rule = "|" + "|".join([" --- ", *(" ---: " for _ in table.columns[1:])]) + "|"
    rows = map(row, table.texts())
    return "\n".join([f"### {markdown_text(table.title)}", "", row(table.columns), rule, *rows]) + "\n"


def markdown_text(text: str) -> str:
    """One line that is neither HTML nor the end of a cell, whatever a stranger's record calls itself."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")


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
