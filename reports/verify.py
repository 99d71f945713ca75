"""Is a stored run what it says: recompute all that follows from its tables, and say what does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from backbench.errors import ReportError
from backbench.reports.metrics import correctness, validity
from backbench.reports.metrics.catalogue import METRIC_SCHEMA, METRICS
from backbench.reports.metrics.compute import sections
from backbench.reports.metrics.metric import ABSENT, Metric
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import RunDirectory, RunRecord, digest_problems, finite
from backbench.reports.record.bundle import expand
from backbench.reports.record.experiment import is_experiment, read_experiment
from backbench.reports.record.sweep import is_sweep, misplaced

RELATIVE = 1e-9
"""Sums in another order may differ in the last digits; no edit a reader would notice is this small."""

NOT_IN_TABLES = "measured beside the tables"


@dataclass(frozen=True)
class Verification:
    """What came out of checking one run."""

    problems: tuple[str, ...]
    """What does not hold, one line each; empty = the record is what its tables say."""
    unchecked: tuple[str, ...] = ()
    """The numbers that could not be recomputed, with the reason, one line each."""


def verify(directory: RunDirectory) -> list[str]:
    """The problems that `examine` finds."""
    return list(examine(directory).problems)


def examine(directory: RunDirectory) -> Verification:
    """Check digests, column types, and every number that a table or the record's own parts give.

    Raises ReportError where run.json itself cannot be read.
    """
    record = directory.read_record()
    problems = list(digest_problems(directory, record))
    try:
        requests, steps = directory.read_requests(), directory.read_steps()
        telemetry = directory.read_telemetry()
        context = Context.from_dict(record.metrics.get("context") or {})
    except ReportError as error:
        return Verification((*problems, str(error)), ("every number: the tables cannot be read",))
    if (record.run.get("imported") or {}).get("rows") is False:
        return Verification(tuple(problems), ("every number: it is a foreign file's own summary",))
    given = {
        name: getattr(record, name) for name in ("memory", "energy", "correctness", "accuracy", "speculation")
    }
    try:
        problems += _column_problems(requests)
        run = RunTables.read(requests, steps, context, telemetry, given)
        found, unchecked = _metric_problems(record, run)
        reasons = validity.of_record(record, telemetry)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        # Tables edited beyond what the metrics accept: that too is a finding, not a crash.
        why = f"the metrics cannot be recomputed from the tables: {type(error).__name__}: {error}"
        return Verification((*problems, why), ("every number: the tables cannot be computed with",))
    problems += found
    problems += differences(record.validity, reasons, "validity")
    problems += correctness.contradictions(record.correctness)
    problems += _status_problems(record, context)
    return Verification(tuple(problems), tuple(unchecked))


def examine_stored(path: Path) -> Verification:
    """Whatever is at `path`: a run, an experiment, or all that a bundle holds."""
    entries = expand(path)
    found = {
        each: examine_experiment(each) if is_experiment(each) else examine(RunDirectory.open(each))
        for each in entries
    }
    if len(entries) == 1:
        return found[entries[0]]
    problems = (f"{each.name}: {line}" for each in entries for line in found[each].problems)
    unchecked = dict.fromkeys(line for each in entries for line in found[each].unchecked)
    return Verification(tuple(problems), tuple(unchecked))


def examine_experiment(path: Path) -> Verification:
    """Every listed run, and whether it is the one that the list says."""
    experiment = read_experiment(path)
    problems: list[str] = []
    unchecked: dict[str, None] = {}
    draws: dict[int, set[str]] = {}
    for listed in experiment.runs:
        try:
            directory = experiment.directory(listed)
            record, found = directory.read_record(), examine(directory)
        except ReportError as error:
            problems.append(str(error))
            continue
        problems += [f"{listed.path}: {problem}" for problem in found.problems]
        if is_sweep(path) and (why := misplaced(directory.path, directory.path.parent.name, record)):
            problems.append(f"{listed.path}: {why}")
        unchecked |= dict.fromkeys(found.unchecked)
        draws.setdefault(listed.block, set()).add(str(record.workload.get("content_hash")))
        for name in ("uuid", "seed"):
            if record.run.get(name) != getattr(listed, name):
                stored, said = record.run.get(name), getattr(listed, name)
                problems.append(f"{listed.path}: its {name} is {stored!r}, the experiment lists {said!r}")
    for block, hashes in draws.items():
        if len(hashes) > 1:
            problems.append(f"block {block}: its runs did not replay the same requests")
    return Verification(tuple(problems), tuple(unchecked))


def _metric_problems(record: RunRecord, run: RunTables) -> tuple[list[str], list[str]]:
    """Mismatches, and what was not recomputed, metric by metric."""
    problems: list[str] = []
    older: list[str] = []
    unknown: list[str] = []
    lacking: list[Metric] = []
    schema = record.metrics.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= METRIC_SCHEMA:
        return [], [f"every number: metric schema {schema!r} is not known to this Backbench"]
    tables = sections(run, dict.fromkeys(metric.path[0] for metric in METRICS))
    for metric in METRICS:
        stored = _at(record, metric.path)
        if metric.later and not _stands(record, metric.path):
            lacking.append(metric)
            continue
        if metric.compute is None or _cannot(metric, run):
            if stored is not None:
                unknown.append(metric.dotted)
            continue
        if schema < metric.since and metric.changes(run):
            older += [f"{metric.dotted}{_those(metric.changed)}"]
            if not metric.changed:
                continue
        computed = _at_sections(tables, metric.path)
        if schema < METRIC_SCHEMA:
            stored, computed = _common(stored, computed)
        skipped = metric.changed if schema < metric.since and metric.changes(run) else ()
        problems += differences(stored, finite(computed), metric.dotted, skipped)
    if schema == METRIC_SCHEMA:
        problems += _stray(record, tables, lacking)
    unchecked = []
    if lacking:
        unchecked.append(f"not in a record of before they were added: {_named(lacking)}")
    if older:
        unchecked.append(f"of an older definition (metric schema {schema}): {', '.join(older)}")
    if unknown:
        unchecked.append(f"{NOT_IN_TABLES}: {', '.join(unknown)}")
    return problems, unchecked


def _stray(
    record: RunRecord, tables: Mapping[str, dict[str, Any]], lacking: Sequence[Metric]
) -> Iterator[str]:
    """What stands in the sections that the tables give and no metric does, and reasons beside nulls."""
    without = {metric.dotted for metric in lacking}
    for name in ("metrics", "schedule", "roofline", "energy"):
        stored, computed = getattr(record, name), tables[name]
        for key in sorted({*stored} - {*computed}):
            yield f"{name}.{key} is {stored[key]!r}, which the tables do not give"
        if name != "energy":
            reasons = computed.get(ABSENT)
            if reasons is not None and lacking:
                reasons = {key: why for key, why in reasons.items() if f"{name}.{key}" not in without} or None
            yield from differences(stored.get(ABSENT), reasons, f"{name}.{ABSENT}")


def _cannot(metric: Metric, run: RunTables) -> bool:
    """Whether this run kept nothing to recompute the metric from."""
    section, key = metric.path[0], metric.path[-1]
    if section == "memory" and metric.compute is not None:
        return finite(metric.compute(run)) is None and _given(run, key) is not None
    if section == "correctness":
        return not isinstance(run.given["correctness"].get("differences"), list)
    if section == "accuracy":
        return not isinstance(run.given["accuracy"].get("sequences"), dict)
    if section == "speculation":
        return not isinstance(run.given["speculation"].get("outcomes"), dict)
    return False


def _stands(record: RunRecord, path: tuple[str, ...]) -> bool:
    """Whether the record has a value there, be it null."""
    *parents, last = path
    found = _at(record, tuple(parents))
    return isinstance(found, dict) and last in found


def _named(metrics: Sequence[Metric]) -> str:
    return ", ".join(metric.dotted for metric in metrics)


def _given(run: RunTables, key: str) -> Any:
    return run.given["memory"].get(key)


def _those(keys: tuple[str, ...]) -> str:
    return f" ({', '.join(keys)})" if keys else ""


def _at(record: RunRecord, path: tuple[str, ...]) -> Any:
    return _at_sections({path[0]: getattr(record, path[0])}, path)


def _at_sections(found: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _common(stored: Any, computed: Any) -> tuple[Any, Any]:
    """Without the reasons that only this version writes beside nulls, and the keys it added."""
    if not isinstance(stored, dict) or not isinstance(computed, dict):
        return stored, computed
    kept = {key: each for key, each in computed.items() if key in stored}
    pairs = {key: _common(stored[key], each) for key, each in kept.items()}
    return stored, {key: pair[1] for key, pair in pairs.items()}


def _column_problems(requests: pd.DataFrame) -> Iterator[str]:
    """The columns that say again what the chunks of a request say."""
    for row in requests.to_dict("records"):
        counts = np.array([np.nan if each is None else each for each in row["token_counts"]], dtype=float)
        times = [int(each) for each in row["token_ns"]]
        ends = (times[0], times[-1]) if times else (None, None)
        seen = {"output_tokens": int(np.nansum(counts)), "first_ns": ends[0], "last_ns": ends[1]}
        for name, value in seen.items():
            stored = None if pd.isna(row[name]) else int(row[name])
            if stored != value:
                request = row["request_id"]
                yield f"requests.parquet: {name} of request {request} is {stored}, its chunks give {value}"
                return


def _status_problems(record: RunRecord, context: Context) -> Iterator[str]:
    if record.run.get("status") == "complete" and context.interrupted:
        yield "run.status says complete, but the replay was interrupted"


def differences(stored: Any, computed: Any, where: str, skipped: tuple[str, ...] = ()) -> list[str]:
    """Every leaf in which the stored value is not the computed one, by its dotted name."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        lines = []
        for key in sorted({*stored, *computed} - {*skipped}):
            name = f"{where}.{key}"
            if key not in stored:
                lines.append(f"{name} is missing; the tables give {computed[key]!r}")
            elif key not in computed:
                lines.append(f"{name} is {stored[key]!r}, which the tables do not give")
            else:
                lines += differences(stored[key], computed[key], name, skipped)
        return lines
    if isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        return [
            line
            for index, pair in enumerate(zip(stored, computed, strict=True))
            for line in differences(*pair, f"{where}[{index}]", skipped)
        ]
    return [] if _same(stored, computed) else [f"{where} is {stored!r}, but the tables give {computed!r}"]


def _same(stored: Any, computed: Any) -> bool:
    numbers = (int, float)
    if (
        isinstance(stored, numbers)
        and isinstance(computed, numbers)
        and not isinstance(stored, bool)
        and not isinstance(computed, bool)
    ):
        return math.isclose(stored, computed, rel_tol=RELATIVE, abs_tol=1e-12)
    return type(stored) is type(computed) and stored == computed
