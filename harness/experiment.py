"""One experiment, a straight line: options -> plan -> replay -> tables -> numbers -> judgement -> record.

The options end in the plan; from the replay on, `harness.recording` has the stages.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import HarnessError
from backbench.harness import memory, provenance, sections
from backbench.harness.faults import explained
from backbench.harness.options import RunOptions
from backbench.harness.provenance import redacted
from backbench.harness.recording import Known, Measured, known_as_json, numbers, tabulate, write, write_tables
from backbench.harness.replay import Progress, mode_of, replay, salted_warmup
from backbench.harness.run_log import RunLog
from backbench.harness.sensors.telemetry import Telemetry
from backbench.harness.subjects.choice import subject_class
from backbench.harness.subjects.subject import Facts, Limits, ObservedTarget, Subject
from backbench.harness.subjects.watched import Watched
from backbench.reports.metrics.validity import NOT_ASKED_FOR
from backbench.reports.metrics.window import FEWEST_REQUESTS, LEAST_S
from backbench.reports.record import RunDirectory, RunRecord

if TYPE_CHECKING:
    from backbench.workloads.request import Request, Workload

OPEN_WARMUP = 16
MOST_WARMUP = 256


class Observer:
    """What a caller may watch; the default watches nothing."""

    def stage(self, text: str) -> None:
        """A new stage of the run began."""

    def progress(self, progress: Progress, target: ObservedTarget) -> None:
        """The replay advanced."""

    def idle(self) -> None:
        """The replay ended."""


@dataclass(frozen=True)
class Outcome:
    """One run as it was written."""

    directory: RunDirectory
    record: RunRecord
    failure: Exception | None = None
    """What ended the replay before its workload did; for the caller to raise."""


@dataclass(frozen=True)
class Plan:
    """What will be replayed, and all that is known of it before; nothing after it reads the options."""

    subject: Subject
    workload: Workload
    warmup: tuple[Request, ...]
    known: Known
    check: bool = True
    """Whether the results are checked after the replay."""
    stall_s: float = 600.0
    """How long a target with requests may say nothing."""


def run(
    options: RunOptions, observer: Observer, subject: Callable[[RunOptions], Subject] | None = None
) -> Outcome:
    """Run the experiment once; `harness.repeats` makes several runs, a process each.

    `subject` makes what is measured; None = what the options ask for.

    The run directory is claimed first, then names and the workload are checked, and only then is the model
    loaded. A directory in which nothing was written is removed again. What an interrupted or failed run
    measured is written all the same.

    Raises:
        HarnessError: the options ask for more than one run.
    """
    if options.repeat > 1:
        raise HarnessError(f"--repeat {options.repeat} takes a process a run; use `bench run --repeat`.")
    try:
        subject = subject or subject_class(options)  # before anything is claimed: its packages may be missing
        with _claimed(options) as log:
            prepared = _prepare(options, subject, observer)
            observer.stage(f"Replaying {prepared.workload.name}")
            return _run_once(plan(options, prepared), log, observer)
    except Exception as error:
        told = explained(error)
        if told is error:
            raise
        raise told from error


@contextmanager
def _claimed(options: RunOptions) -> Iterator[RunLog]:
    """The log of the run, whose directory nobody else has until the end."""
    if options.out is None:
        log = RunLog.claim_new(default_directory(options))
    else:
        log = RunLog.claim(options.out)
    try:
        yield log
    finally:
        log.release()


def default_directory(options: RunOptions) -> Path:
    """runs/<utc>-<workload>-<backend>; the one who claims it appends a number where that is taken."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = Path(options.workload).name
    name = name.replace(":", "-") if ":" in name else name.split(".")[0]
    return Path("runs") / f"{stamp}-{name}-{Path(options.backend).stem}"


@dataclass(frozen=True)
class _Prepared:
    """What is made before the plan."""

    subject: Subject
    workload: Workload


def _prepare(
    options: RunOptions, subject_of: Callable[[RunOptions], Subject], observer: Observer
) -> _Prepared:
    observer.stage("Preparing the workload")
    subject = subject_of(options)
    workload = make_workload(options, subject.limits())
    if workload.schedule_s is not None and workload.schedule_s >= 1:
        # What answers take comes on top of a session's own times.
        least = "at least " if "sessions" in workload.parameters else ""
        due = timedelta(seconds=round(workload.schedule_s))
        observer.stage(f"The last request is due after {least}{due}")
    subject.prepare(workload, observer.stage)
    return _Prepared(subject, workload)


def make_workload(options: RunOptions, limits: Limits) -> Workload:
    """The realised workload, sized for the subject where nothing was said."""
    from backbench.workloads.catalogue import entry_of, make
    from backbench.workloads.options import WorkloadOptions

    load = dict(options.load)
    defaults = entry_of(options.workload)
    if defaults is not None:
        drawn = "num_requests" in defaults.options and "num_requests" in defaults.defaults
        if drawn and "dataset" not in load:
            load.setdefault("num_requests", limits.num_requests)
        offered = {"rate", "arrival", "concurrency", "time_scale", "rate_scale", "all_at_once"} & load.keys()
        if not offered and "concurrency" in defaults.defaults:
            load["concurrency"] = limits.concurrency
    if limits.tokenize is not None:
        load["tokenize"] = limits.tokenize
        load["tokenize_chat"] = limits.tokenize_chat
    return make(
        options.workload,
        WorkloadOptions(seed=options.seed, vocab_size=limits.vocab_size, max_len=limits.max_len, **load),
    )


def plan(options: RunOptions, prepared: _Prepared) -> Plan:
    """The run of a prepared experiment."""
    subject, workload = prepared.subject, prepared.workload
    count = default_warmup(workload) if options.warmup is None else options.warmup
    warmup = salted_warmup(workload, count, subject.limits().vocab_size, options.seed)
    facts = subject.facts()
    context = make_context(options, facts, workload)
    known = Known(
        run=sections.run_section(options),
        workload=redacted(sections.workload_section(workload, context["ideal_prefix_hit_ratio"])),
        model=redacted(facts.model),
        engine=redacted(subject.settings()),
        backend=redacted(facts.backend),
        system=redacted(facts.system),
        software=provenance.software(),
        warmup={
            "seconds": facts.warm_up_s,
            "requests": len(warmup),
            "salted": True,
            "drained": context["mode"] == "all_at_once",
        },
        context=context,
        memory=asdict(replace(subject.memory(), kv_used_peak_bytes=None)),
        idle_power_w=facts.idle_power_w,
    )
    return Plan(subject, workload, warmup, known, options.check, options.stall_timeout)


def default_warmup(workload: Workload) -> int:
    """A closed loop's whole concurrency, so that its burst at the start is no measured request's; else 16."""
    return min(MOST_WARMUP, workload.concurrency or OPEN_WARMUP, len(workload.requests))


def make_context(options: RunOptions, facts: Facts, workload: Workload) -> dict[str, Any]:
    """What the metrics need besides the tables, but for how the replay ends."""
    from backbench.workloads.statistics import answered_tokens, ideal_prefix_hit_ratio

    ideal = None
    if facts.block_size is not None:
        prompts = (request.prompt for request in workload.requests)
        ideal = ideal_prefix_hit_ratio(prompts, facts.block_size, answered_tokens(workload.requests))
    return {
        "mode": mode_of(workload),
        "batch_limit": facts.batch_limit,
        "concurrency": workload.concurrency,
        "gpus": facts.gpus,
        "slo_s": dict(options.slo_s),
        "ideal_prefix_hit_ratio": ideal,
        "shape": facts.shape,
        "peaks": facts.peaks,
        "steady_least_s": LEAST_S,
        "steady_fewest_requests": FEWEST_REQUESTS,
    }


def _run_once(planned: Plan, log: RunLog, observer: Observer) -> Outcome:
    """Replay and record; written before the check of results, which may be interrupted or fail."""
    measured = measure(planned, log, observer)
    tables = tabulate(measured)
    write_tables(log.directory, tables)
    record = write(log.directory, numbers(tables), tables)
    log.release()
    failure = measured.replay.failure
    if measured.replay.interrupted:
        return Outcome(log.directory, record, None if failure is None else explained(failure))
    if not planned.check:
        unasked = {"reason": NOT_ASKED_FOR}
        record = replace(record, correctness={"passed": None} | unasked, accuracy=unasked)
        return Outcome(log.directory, write(log.directory, record, tables))
    observer.stage("Checking results")
    try:
        record = replace(record, correctness=planned.subject.check(planned.workload))
        observer.stage("Measuring accuracy")
        record = replace(record, accuracy=redacted(planned.subject.accuracy()))
    except KeyboardInterrupt:
        record = replace(record, run=record.run | {"status": "interrupted"})
    return Outcome(log.directory, write(log.directory, record, tables))


def measure(planned: Plan, log: RunLog, observer: Observer) -> Measured:
    """Replay the plan under telemetry, and read the memory before anything else uses it."""
    subject = planned.subject
    log.begin(known_as_json(planned.known), planned.workload, planned.warmup, subject.clock)
    target = subject.start()
    memory.give_back()
    watched = Watched(target, planned.stall_s, subject.clock)
    telemetry = Telemetry(*subject.sensors(), clock=subject.clock)
    with collector_at_rest(), telemetry, log, watched:
        done = replay(
            watched,
            planned.workload,
            warmup=planned.warmup,
            clock=subject.clock,
            on_progress=lambda progress: observer.progress(progress, target),
            on_trace=log.note,
        )
    observer.idle()
    seen = redacted(subject.finish(done, observer.stage))
    known = replace(planned.known, engine=redacted(subject.settings()))
    if log.failure is not None:
        known = replace(known, run=known.run | {"log": log.failure})
    readings = subject.memory(reachable=done.failure is None)
    return Measured(known, done, target.steps, telemetry.rows, telemetry.reasons, readings, target=seen)


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep what lives for the whole run out of the garbage collector's walks while time is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
