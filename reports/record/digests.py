"""Digests of a run's files: whether they are still the ones that were written together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from backbench.reports.record.bundle import is_file, read_bytes
from backbench.reports.record.directory import RunDirectory
from backbench.reports.record.schema import (
    ADDED_SECTIONS,
    RECORD_FILE,
    REQUESTS_FILE,
    STEPS_FILE,
    TELEMETRY_FILE,
    RunRecord,
    finite,
)

TABLES = (REQUESTS_FILE, STEPS_FILE, TELEMETRY_FILE)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def record_digest(record: RunRecord) -> str:
    """Hex digest of the record's JSON without its own digest."""
    digests = {name: value for name, value in record.run.get("digests", {}).items() if name != RECORD_FILE}
    plain = finite(vars(replace(record, run=record.run | {"digests": digests})))
    plain = {name: each for name, each in plain.items() if each or name not in ADDED_SECTIONS}
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sign(directory: RunDirectory, record: RunRecord) -> RunRecord:
    """The record with the digests of its tables and of itself; the tables must be written."""
    digests = {name: sha256(directory.path / name) for name in TABLES}
    signed = replace(record, run=record.run | {"digests": digests})
    return replace(signed, run=signed.run | {"digests": digests | {RECORD_FILE: record_digest(signed)}})


def digest_problems(directory: RunDirectory, record: RunRecord) -> Iterator[str]:
    """What is not as it was written, one line each; a digest does not say who wrote it."""
    digests = record.run.get("digests") or {}
    for name in TABLES:
        path = directory.path / name
        if not is_file(path):
            yield f"{name} is missing"
        elif name not in digests:
            yield f"run.json holds no digest of {name}"
        elif sha256(path) != digests[name]:
            yield f"{name} is not the file this record was made from (its digest differs)"
    if RECORD_FILE not in digests:
        yield "run.json holds no digest of itself"
    elif record_digest(record) != digests[RECORD_FILE]:
        yield "run.json was edited after the run (its digest differs)"
