"""The report's parts that are neither a figure nor a table of quantities: memory, time, provenance."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from backbench.reports.arms import Arm, measured
from backbench.reports.compare import Difference, flatten, show
from backbench.reports.metrics.engine_steps import time_shares
from backbench.reports.metrics.metric import ABSENT, Quantity
from backbench.reports.page.run_data import Page, RunData, labels_of
from backbench.reports.page.style import vendor
from backbench.reports.quantities import (
    DASH,
    QUANTITIES,
    digits,
    format_reading,
    format_value,
    quantity,
    read,
)
from backbench.reports.record import RunRecord
from backbench.reports.tables import Cell, Table, clipping


@dataclass(frozen=True)
class Segment:
    """A stretch of a memory bar."""

    kind: str
    """CSS class: "weights", "kv-used", "kv-free", "other", "free"."""
    label: str
    text: str
    percent: float
    """Of the bar."""


@dataclass(frozen=True)
class MemoryBar:
    """One run's memory, from the weights up to the device's capacity."""

    run: str
    segments: tuple[Segment, ...]
    scale: str
    """What the whole bar stands for, e.g. "141 GiB, the device's capacity"."""


def memory_bars(records: Sequence[RunRecord], names: Sequence[str]) -> list[MemoryBar]:
    """One bar a run that has memory numbers; every bar has the same scale."""
    parts = [_memory_parts(record.memory) for record in records]
    capacities = [_capacity(record) for record in records]
    totals = [sum(size for _, _, size in each) for each in parts]
    whole = max([*totals, *(each for each in capacities if each)], default=0)
    if not whole:
        return []
    bars = []
    for name, each, capacity, total in zip(names, parts, capacities, totals, strict=True):
        if not total:
            continue
        if capacity and capacity > total:
            each = [*each, ("free", "Not in use", capacity - total)]
        segments = tuple(
            Segment(kind, label, format_value(size, "bytes"), round(100 * size / whole, 3))
            for kind, label, size in each
        )
        meaning = "the device's capacity" if capacity else "in total"
        bars.append(MemoryBar(name, segments, f"{format_value(capacity or total, 'bytes')}, {meaning}"))
    return bars


def _capacity(record: RunRecord) -> float | None:
    """A card's memory; None on a CPU, whose memory is not the engine's to fill."""
    return None if vendor(record) == "cpu" else record.memory.get("capacity_bytes")


def _memory_parts(memory: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(kind, label, bytes) in stacking order. What the total holds beyond the known parts is "other"."""
    weights, pool = memory.get("weights_bytes") or 0, memory.get("kv_pool_bytes") or 0
    used, total = memory.get("kv_used_peak_bytes"), memory.get("total_bytes") or 0
    other = memory.get("other_bytes")
    other = max(total - weights - pool, 0) if other is None else other
    parts = [("weights", "Weights", weights)]
    if used is None:
        parts.append(("kv-free", "KV pool", pool))
    else:
        parts += [("kv-used", "KV used, peak", used), ("kv-free", "KV reserved, unused", max(pool - used, 0))]
    parts.append(("other", "Other", other))
    return [part for part in parts if part[2]]


def time_table(runs: Sequence[RunData]) -> Table:
    """Where the steps' time went: by what the steps held, and on the host."""
    rows = []
    for run in runs:
        shares = time_shares(run.tables)
        if shares is None:
            continue
        steps = run.tables.measured_steps
        count, preemptions = len(steps), int(steps["preemptions"].sum())
        head = (Cell(run.style.label), Cell(f"{count:,}", sort=count))
        cells = (Cell(format_value(share, "ratio"), sort=share) for share in astuple(shares))
        rows.append((*head, *cells, Cell(f"{preemptions:,}", sort=preemptions)))
    columns = ("Run", "Steps", "Decode only", "Mixed", "Prefill only", "Host", "From a graph", "Preemptions")
    return Table("Step time by what the steps held", columns, tuple(rows))


def fit_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """The decode fit's terms beside the hardware's floors. Only the slope has a ratio to its floor: the
    intercept holds the host too, which no bandwidth bounds."""
    rows = []
    several = len(records) > 1
    for label, key, floor_key in (
        ("Intercept: weights and host", "intercept_s", "intercept_floor_s"),
        ("Per sequence", "per_sequence_s", None),
        ("Slope: KV read, per context token", "slope_s_per_token", "slope_floor_s_per_token"),
    ):
        for name, record in zip(names, records, strict=True):
            fit = record.roofline.get("decode_fit") or {}
            value, floor = fit.get(key), fit.get(floor_key or "")
            why = (record.roofline.get(ABSENT) or {}).get(f"decode_fit.{key}") or fit.get("reason") or ""
            if value is None and not why:
                continue
            over = DASH
            if value is not None and floor and key == "slope_s_per_token":
                over = f"{digits(value / floor)}×"
            head = (Cell(label), *((Cell(name),) if several else ()))
            cells = (Cell(format_value(value, "s"), note=why, sort=value), Cell(format_value(floor, "s")))
            rows.append((*head, *cells, Cell(over)))
    columns = ("Part of a decode step", *(("Run",) if several else ()), "Measured", "Floor", "Over the floor")
    return Table("Decode fit", columns, tuple(rows))


def operation_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Operation by operation, the backend that really ran, and whether on launches tuned for the device."""
    used = [record.backend.get("used") or {} for record in records]
    operations = list(dict.fromkeys(operation for each in used for operation in each))
    rows = tuple(
        (Cell(operation), *(Cell(served(record, operation)) for record in records))
        for operation in operations
    )
    return Table("Backend that ran each operation", ("Operation", *names), rows)


def served(record: RunRecord, operation: str) -> str:
    """Like "triton (tuned)"; the name alone where the backend has nothing to tune."""
    name = show((record.backend.get("used") or {}).get(operation))
    tuned = record.backend.get("tuned")
    state = tuned.get(operation) if isinstance(tuned, dict) else None
    return f"{name} ({state})" if state else name


def portability_table(records: Sequence[RunRecord]) -> Table:
    """Target by target, whether the kernels of these runs compile there, and where they really ran."""
    found = next((each for each in (record.backend.get("portability") for record in records) if each), None)
    ran_on = {(record.backend.get("portability") or {}).get("ran_on") for record in records}
    rows = []
    for target, counts in (found or {}).get("targets", {}).items():
        spills = counts["spilling"]
        spilling = f"{spills}, at most {counts['most_spill_bytes']} B a thread" if spills else "none"
        rows.append(
            (
                Cell(target),
                Cell("ran here" if target in ran_on else "compiled, not run"),
                Cell(f"{counts['kernels']:,}", sort=counts["kernels"]),
                Cell(f"{counts['refused']:,}", sort=counts["refused"]),
                Cell(f"{counts['problems']:,}", sort=counts["problems"]),
                Cell(spilling, sort=counts["most_spill_bytes"]),
            )
        )
    columns = ("Target", "State", "Kernels compiled", "Refused", "Cannot run", "Spill registers")
    return Table("Where else these kernels compile", columns, tuple(rows))


def passed_over(record: RunRecord) -> list[tuple[str, str]]:
    """(what, why) for every backend that was not taken."""
    return [(name, show(why)) for name, why in sorted((record.backend.get("passed_over") or {}).items())]


def correctness_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table:
    """Accuracy beside what could have cost it: dtype and quantization."""
    rows = []
    for name, record in zip(names, records, strict=True):
        found = record.correctness
        agreement = found.get("top1_agreement")
        result = {True: "passed", False: "failed", None: "not checked"}[found.get("passed")]
        numbers = [found.get(key) for key in ("max_abs_logprob_diff", "mean_abs_logprob_diff", "tolerance")]
        cells = [Cell(format_value(number, "nat"), sort=number) for number in numbers]
        tokens = found.get("tokens")
        rows.append(
            (
                Cell(name),
                Cell(result),
                *cells[:2],
                Cell(format_value(agreement, "ratio"), sort=agreement),
                cells[2],
                Cell(DASH if tokens is None else f"{tokens:,}", sort=tokens),
                Cell(show(record.model.get("dtype"))),
                Cell(show(record.model.get("quantization"))),
            )
        )
    columns = ("Run", "Check", "Max |Δ log p|", "Mean |Δ log p|", "Top-1 agreement", "Tolerance")
    return Table("Correctness", (*columns, "Tokens", "Weights", "Quantization"), tuple(rows))


ACCURACY = tuple(each for each in QUANTITIES if "accuracy" in (*each.path, each.group.lower()))
"""What the record measures of a model's answers."""


def accuracy_table(arms: Sequence[Arm]) -> Table:
    """Accuracy beside speed; no rows unless a run's weights are quantized or sparse."""
    rate = quantity("metrics", "output_tokens_per_s", "whole_run")
    records = [arm.representative.record for arm in arms]
    if not any(each.model.get("quantization") or each.model.get("sparsity") for each in records):
        return Table("Accuracy beside speed", (), ())
    known = [*ACCURACY, quantity("correctness", "top1_agreement")]
    rows = []
    for arm, record in zip(arms, records, strict=True):
        weights = [record.model.get(name) for name in ("dtype", "quantization", "sparsity")]
        readings = [measured(arm, each) for each in (rate, *known)]
        texts = zip(readings, (rate, *known), strict=True)
        cells = (Cell(format_reading(found, each.unit), sort=found.value) for found, each in texts)
        rows.append((Cell(arm.label), Cell(", ".join(show(each) for each in weights if each)), *cells))
    columns = ("Run", "Weights", "Output tok/s, whole run", *(each.label for each in known))
    return Table("Accuracy beside speed", columns, tuple(rows))


def speculation_table(arms: Sequence[Arm]) -> Table:
    """What was drafted, accepted and paid for, beside the waits it makes; no rows unless a run drafted."""
    arms = [arm for arm in arms if arm.representative.record.speculation]
    known = [each for each in QUANTITIES if each.path[0] == "speculation"]
    known += [quantity("metrics", key, part) for key in ("itl_s", "icl_s") for part in ("p50", "p99")]
    rows = []
    for arm in arms:
        section = arm.representative.record.speculation
        readings = [measured(arm, each) for each in known]
        texts = zip(readings, known, strict=True)
        cells = (Cell(format_reading(found, each.unit), sort=found.value) for found, each in texts)
        places = (Cell(_by_place(section.get(name), form)) for name, form in BY_PLACE.values())
        rows.append((Cell(arm.label), Cell(show(section.get("asked"))), *cells, *places))
    columns = ("Run", "Drafts by", *(each.label for each in known), *BY_PLACE)
    return Table("Speculation", columns, tuple(rows))


BY_PLACE = {
    "Accepted by place": ("unconditional_rates", "{:.0%}"),
    "Where those before were": ("conditional_rates", "{:.0%}"),
    "Drafts with 0, 1, 2 ... tokens accepted": ("histogram", "{:,}"),
}
"""Column -> the field of the section that it lists, and how."""


def _by_place(found: Any, form: str) -> str:
    """The values of a field with one for each place in a draft, in order."""
    if not isinstance(found, dict) or not found:
        return DASH
    values = (found[key] for key in sorted(found, key=lambda key: (len(key), key)))
    return " · ".join(DASH if value is None else form.format(value) for value in values)


UNTELLING = re.compile(r"^run\.command$|(hash|sha|digests?|uuid)\b|(utc|seconds|_s|_ns|idle_power_w)$")
"""Fields that tell little: hashes, stamps, durations, a sensor's reading, a command that others repeat."""


def telling(found: Sequence[Difference]) -> tuple[list[Difference], list[Difference]]:
    """Differences that tell something, and hashes, stamps and durations."""
    untelling = [bool(UNTELLING.search(each.field)) for each in found]
    pairs = list(zip(found, untelling, strict=True))
    return [each for each, dull in pairs if not dull], [each for each, dull in pairs if dull]


def turned(table: Table) -> Table:
    """Rows as columns: many runs stand below each other."""
    columns = (table.columns[0], *(row[0].value for row in table.rows))
    names = table.columns[1:]
    rows = tuple(
        (Cell(name, sort=name), *(row[place] for row in table.rows)) for place, name in enumerate(names, 1)
    )
    return Table(table.title, ("Run", *columns[1:]), rows if table.rows else ())


def gate_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    """Each gate's verdict a metric, with what it could have seen."""
    rows = []
    for row in gates:
        if row.get("metric") is None:
            continue
        loss, low, high = row["loss"], row["low"], row["high"]
        rows.append(
            (
                Cell(f"{row['utc']} {row['gate']}"),
                Cell(str(row["metric"])),
                Cell(str(row["verdict"])),
                Cell(f"{loss:+.2%}", f"{low:+.2%} to {high:+.2%}", sort=loss),
                Cell(f"{row['margin']:.0%}", sort=row["margin"]),
                Cell(f"{row['detectable']:.2%}", sort=row["detectable"]),
            )
        )
    columns = ("Gate", "Metric", "Verdict", "Loss, + is worse", "Margin", "Could have seen")
    return Table("Gate history and noise floor", columns, tuple(rows))


def glossary(wanted: Sequence[Quantity]) -> list[tuple[str, str]]:
    """(labels, definition) of the quantities on the page; those of one metric stand together."""
    labels: dict[str, list[str]] = {}
    for each in wanted:
        if each.definition:
            labels.setdefault(each.definition, []).append(each.label)
    return [(", ".join(names), definition) for definition, names in labels.items()]


def device(record: RunRecord) -> str:
    """The name of what the engine ran on."""
    found = record.system.get("device")
    return str(found.get("name") or "") if isinstance(found, dict) else ""


def provenance(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    """(section, [(field, value)]) for everything that says how the run came to be."""
    sections = ("run", "workload", "model", "engine", "backend", "system", "software", "energy", "warmup")
    found = []
    for section in sections:
        fields = [
            (name.removeprefix(f"{section}."), show(value))
            for name, value in flatten(getattr(record, section), section)
            if name != section
        ]
        if fields:
            found.append((section.capitalize(), fields))
    return found


def schedule_notes(record: RunRecord) -> list[str]:
    """What the offered load did, in sentences."""
    schedule, counts = record.schedule, record.metrics.get("counts") or {}
    notes = [f"{clipped}."] if (clipped := clipping(record)) else []
    if schedule.get("offered_requests_per_s") is not None:
        offered = format_value(schedule["offered_requests_per_s"], "req/s")
        achieved = format_value(schedule.get("achieved_requests_per_s"), "req/s")
        notes.append(f"Offered {offered}, achieved {achieved}.")
    lag = schedule.get("lag_s") or {}
    worst = lag.get("max")
    if isinstance(worst, int | float):
        notes.append(f"Requests were sent at most {format_value(worst, 's')} after their intended time.")
    if schedule.get("index_of_dispersion") is not None:
        dispersion = digits(schedule["index_of_dispersion"])
        notes.append(f"Index of dispersion of the arrivals: {dispersion} (Poisson has 1).")
    gap = read(record, quantity("metrics", "fidelity", "prefix_hits")).value
    if gap is not None:
        side = "below" if gap < 0 else "above"
        share = f"{abs(gap):.2%} of the prompt tokens"
        notes.append(f"The realised prefix hit ratio was {share} {side} the ideal one.")
    if schedule.get("client_saturated"):
        notes.append("The client was saturated: the load is lower than intended.")
    missing = [
        (counts.get(key), words) for key, words in (("failed", "failed"), ("never_sent", "never sent"))
    ]
    notes += [f"{count:,} requests {words}." for count, words in missing if count]
    return notes


def _few(page: Page) -> tuple[list[RunRecord], list[str]]:
    return [run.record for run in page.drawn], labels_of(page.drawn)


SECTIONS: dict[str, Callable[[Page], Any]] = {
    "memory": lambda page: memory_bars(*_few(page)),
    "time": lambda page: time_table(page.drawn),
    "fit": lambda page: fit_table(*_few(page)),
    "operations": lambda page: operation_table(*_few(page)),
    "portability": lambda page: portability_table(page.records),
    "passed_over": lambda page: [passed_over(run.record) for run in page.drawn],
    "correctness": lambda page: correctness_table(page.records, page.names),
    "accuracy": lambda page: accuracy_table(page.arms),
    "speculation": lambda page: turned(speculation_table(page.arms)),
    "schedule": lambda page: [schedule_notes(run.record) for run in page.drawn],
    "provenance": lambda page: [provenance(run.record) for run in page.drawn],
}
"""Name in templates/report.html -> what stands there."""
