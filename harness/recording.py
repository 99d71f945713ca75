"""From a replay to a signed record: each stage takes what the one before made, and nothing else.

`Measured` -> `tabulate` -> `Tables` -> `numbers` -> a record -> `judged` -> `write`. Nothing here knows what
was measured or what was asked for: that stands in `Known`, which a run's log keeps too, so that a killed
run is recorded by the same stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import HarnessError
from backbench.harness import memory, run_log, sections
from backbench.harness.frames import request_frame, step_frame, telemetry_frame
from backbench.harness.memory import Readings
from backbench.harness.replay import Replay
from backbench.harness.sensors.telemetry import Row
from backbench.reports.metrics import compute, validity
from backbench.reports.metrics.energy import SCOPES
from backbench.reports.metrics.memory import explained
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.run import RunTables
from backbench.reports.record import RunDirectory, RunRecord, sign

if TYPE_CHECKING:
    import pandas as pd

    from backbench.engine.request import StepStats


@dataclass(frozen=True)
class Known:
    """What is known of a run before its first request. Plain values, which JSON can hold."""

    run: dict[str, Any]
    workload: dict[str, Any]
    model: dict[str, Any]
    engine: dict[str, Any]
    backend: dict[str, Any]
    system: dict[str, Any]
    software: dict[str, Any]
    warmup: dict[str, Any]
    context: dict[str, Any]
    """`reports.metrics.requests.Context`, but for how the replay ends."""
    memory: dict[str, Any]
    """`memory.Readings` as far as they stand before the run."""
    idle_power_w: float | None = None


@dataclass(frozen=True)
class Measured:
    """One replay and what was seen beside it, on one clock."""

    known: Known
    replay: Replay
    steps: Sequence[StepStats]
    samples: Sequence[Row]
    missing: Sequence[str]
    """Why a sensor is missing."""
    memory: Readings
    failure: str | None = None
    """Why the steps are not known."""
    target: dict[str, Any] = field(default_factory=dict)
    """The record's `target` section."""


@dataclass(frozen=True)
class Tables:
    """The record's tables, in time relative to the run's start, and what stands beside them."""

    known: Known
    context: Context
    ending: dict[str, Any]
    """`status`, `error` and `start_unix_ns` of the record's `run` section."""
    requests: pd.DataFrame
    steps: pd.DataFrame
    telemetry: pd.DataFrame
    missing: Sequence[str]
    memory: Readings
    speculation: dict[str, Any]
    """What of the steps no table has: drafts and what became of them."""
    target: dict[str, Any] = field(default_factory=dict)


def tabulate(measured: Measured) -> Tables:
    """The replay as tables."""
    done = measured.replay
    ends = {"end_ns": done.end_ns - done.start_ns, "interrupted": done.interrupted}
    return Tables(
        measured.known,
        Context.from_dict(measured.known.context | ends),
        sections.ending(done),
        request_frame(done),
        step_frame(measured.steps, done.start_ns),
        telemetry_frame(measured.samples, done.start_ns),
        measured.missing,
        measured.memory,
        sections.speculation_section(measured.known.engine, measured.steps, done.start_ns, measured.failure),
        measured.target,
    )


def numbers(tables: Tables) -> RunRecord:
    """The record with every number that follows from the tables; not judged yet."""
    known, context = tables.known, tables.context
    vendor = (known.system.get("device") or {}).get("vendor")
    beside: dict[str, Any] = {
        "energy": {
            "sensor_reasons": list(tables.missing),
            "idle_power_w": known.idle_power_w,
            "scope": SCOPES.get(str(vendor)),
        },
        "speculation": tables.speculation,
    }
    run = RunTables.read(tables.requests, tables.steps, context, tables.telemetry, beside)
    computed = compute.sections(run, (*compute.SECTIONS, "energy", "speculation"))
    return RunRecord(
        run=known.run | tables.ending,
        workload=known.workload,
        model=known.model,
        engine=known.engine,
        backend=known.backend,
        system=known.system,
        software=known.software,
        memory=explained(memory.section(tables.memory, tables.telemetry), on_gpu=context.gpus > 0),
        energy=computed["energy"],
        correctness={"passed": None, "reason": "the run ended before the check"},
        accuracy={"reason": "the run ended before it was measured"},
        speculation=tables.speculation
        | (computed["speculation"] if "outcomes" in tables.speculation else {}),
        metrics=computed["metrics"],
        schedule=computed["schedule"],
        roofline=computed["roofline"],
        warmup=known.warmup,
        target=tables.target,
    )


def judged(record: RunRecord, tables: Tables) -> RunRecord:
    """The record with the reasons not to believe it."""
    found = validity.of_record(record, tables.telemetry)
    return replace(record, validity=found)


def write_tables(directory: RunDirectory, tables: Tables) -> None:
    """The three tables; before the record, which holds their digests."""
    directory.write_requests(tables.requests)
    directory.write_steps(tables.steps)
    directory.write_telemetry(tables.telemetry)


def write(directory: RunDirectory, record: RunRecord, tables: Tables) -> RunRecord:
    """Judge, sign and write the record; returns it as written."""
    record = sign(directory, judged(record, tables))
    directory.write_record(record)
    return record


def recover(path: Path) -> RunRecord:
    """Record what the log of a killed run holds, and remove the log.

    Raises HarnessError where there is nothing to recover.
    """
    with run_log.reading(path) as (data, replay):
        try:
            known = Known(**data)
            readings = Readings(**known.memory)
        except TypeError as error:
            raise HarnessError(f"The log in {path} is of another version of Backbench: {error}.") from None
        known = replace(known, run=known.run | {"recovered": True})
        tables = tabulate(
            Measured(known, replay, [], [], ["the run was killed"], readings, "the run was killed")
        )
        directory = RunDirectory.open(path)
        write_tables(directory, tables)
        record = replace(
            numbers(tables),
            correctness={"passed": None, "reason": "the run was killed before the check"},
            accuracy={"reason": "the run was killed before it was measured"},
        )
        return write(directory, record, tables)


def known_as_json(known: Known) -> dict[str, Any]:
    """For a run's log; `Known(**...)` reads it back."""
    return asdict(known)
