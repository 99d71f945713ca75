"""Is a stored run what it says: recompute every number of its summary from its tables."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from backbench.errors import ReportError
from backbench.reports.metrics import energy
from backbench.reports.metrics.compute import compute, windows
from backbench.reports.metrics.requests import Context
from backbench.reports.record import (
    RECORD_FILE,
    REQUESTS_FILE,
    STEPS_FILE,
    TELEMETRY_FILE,
    RunDirectory,
    RunRecord,
    finite,
)

TABLES = (REQUESTS_FILE, STEPS_FILE, TELEMETRY_FILE)
RELATIVE = 1e-9
"""Sums in another order may differ in the last digits; no edit a reader would notice is this small."""


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_digest(record: RunRecord) -> str:
    """Hex digest of the record's JSON without its own digest."""
    digests = {name: value for name, value in record.run.get("digests", {}).items() if name != RECORD_FILE}
    plain = finite(asdict(replace(record, run=record.run | {"digests": digests})))
    # Through JSON text once, so that what was written and what was read give the same bytes.
    text = json.dumps(json.loads(json.dumps(plain)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sign(directory: RunDirectory, record: RunRecord) -> RunRecord:
    """The record with the digests of its tables and of itself; the tables must be written."""
    digests = {name: sha256(directory.path / name) for name in TABLES}
    signed = replace(record, run=record.run | {"digests": digests})
    return replace(signed, run=signed.run | {"digests": digests | {RECORD_FILE: record_digest(signed)}})


def verify(directory: RunDirectory) -> list[str]:
    """What does not hold, one line each; empty = the record is what its tables say.

    Raises ReportError where run.json itself cannot be read.
    """
    record = directory.read_record()
    problems = list(_digest_problems(directory, record))
    try:
        requests, steps = directory.read_requests(), directory.read_steps()
        telemetry = directory.read_telemetry()
        context = Context.from_dict(record.metrics.get("context") or {})
    except ReportError as error:
        return [*problems, str(error)]
    try:
        sections = compute(requests, steps, context)
        sections["energy"] = _energy(record, requests, telemetry, context, sections["metrics"])
    except (ValueError, KeyError, IndexError, TypeError, ArithmeticError) as error:
        # Tables edited beyond what the metrics accept: that too is a finding, not a crash.
        return [*problems, f"the metrics cannot be recomputed from the tables: {error}"]
    for name, computed in sections.items():
        problems += differences(getattr(record, name), finite(computed), name)
    if record.run.get("status") == "complete" and context.interrupted:
        problems.append("run.status says complete, but the replay was interrupted")
    return problems


def _energy(
    record: RunRecord, requests: Any, telemetry: Any, context: Context, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Recomputed; what comes from before the run (idle power, missing sensors) is taken from the record."""
    whole, steady = windows(requests, context)
    tokens = energy.tokens_in(metrics, whole, steady)
    reasons, idle_power_w = record.energy.get("sensor_reasons") or [], record.energy.get("idle_power_w")
    return energy.section(telemetry, steady, whole, tokens, reasons, idle_power_w)


def _digest_problems(directory: RunDirectory, record: RunRecord) -> Iterator[str]:
    digests = record.run.get("digests") or {}
    for name in TABLES:
        path = directory.path / name
        if not path.exists():
            yield f"{name} is missing"
        elif name not in digests:
            yield f"run.json holds no digest of {name}"
        elif sha256(path) != digests[name]:
            yield f"{name} is not the file this record was made from (its digest differs)"
    if RECORD_FILE not in digests:
        yield "run.json holds no digest of itself"
    elif record_digest(record) != digests[RECORD_FILE]:
        yield "run.json was edited after the run (its digest differs)"


def differences(stored: Any, computed: Any, where: str) -> list[str]:
    """Every leaf in which the stored value is not the computed one, by its dotted name."""
    if isinstance(stored, dict) and isinstance(computed, dict):
        lines = []
        for key in sorted({*stored, *computed}):
            name = f"{where}.{key}"
            if key not in stored:
                lines.append(f"{name} is missing; the tables give {computed[key]!r}")
            elif key not in computed:
                lines.append(f"{name} is {stored[key]!r}, which the tables do not give")
            else:
                lines += differences(stored[key], computed[key], name)
        return lines
    if isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        return [
            line
            for index, pair in enumerate(zip(stored, computed, strict=True))
            for line in differences(*pair, f"{where}[{index}]")
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
