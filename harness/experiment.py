"""One experiment from its options to a run directory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backbench.errors import HarnessError
from backbench.harness import correctness, memory, provenance, sections
from backbench.harness.faults import explained
from backbench.harness.frames import request_frame, step_frame, telemetry_frame
from backbench.harness.options import RunOptions
from backbench.harness.peaks import measure_peaks
from backbench.harness.replay import Progress, Replay, mode_of, replay, salted_warmup
from backbench.harness.sensors.amd import AmdSmiSensor
from backbench.harness.sensors.telemetry import NvmlSensor, Telemetry, open_sensors
from backbench.harness.subjects.engine import EngineTarget, model_shape
from backbench.reports.metrics import energy, validity
from backbench.reports.metrics.compute import compute, windows
from backbench.reports.metrics.memory import explained as explained_memory
from backbench.reports.metrics.requests import Context
from backbench.reports.metrics.roofline import Peaks
from backbench.reports.record import RunDirectory, RunRecord
from backbench.reports.verify import sign

if TYPE_CHECKING:
    from backbench.backends.interface import Device
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import ModelSource
    from backbench.workloads.request import Workload

CPU_REQUESTS = 48
"""Default number of requests on a CPU, where a run should take about a minute."""
GPU_REQUESTS = 512
CPU_CONCURRENCY = 16
GPU_CONCURRENCY = 64
CPU_STEP_TOKENS = 2048
"""Default token budget of a step on a CPU, where a larger one only makes decodes wait."""
OPEN_WARMUP = 16
MOST_WARMUP = 256


class Observer:
    """What a caller may watch; the default watches nothing."""

    def stage(self, text: str) -> None:
        """A new stage of the run began."""

    def progress(self, progress: Progress, target: EngineTarget) -> None:
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
class _Machine:
    """What the runs of one experiment share."""

    device: Device
    source: ModelSource
    engine: Engine
    idle_bytes: int | None
    peaks: Peaks
    accelerator: dict[str, Any]
    warm_up_s: float


def run(options: RunOptions, observer: Observer) -> list[Outcome]:
    """Run the experiment `options.repeat` times; each run writes its own directory.

    The run directory is made first, then names and the workload are checked, and only then is the model
    loaded. A directory in which nothing was written is removed again. An interrupted or failed run ends the
    series; what it measured is written all the same.
    """
    path = options.out or default_directory(options)
    paths = [path] if options.repeat == 1 else [path / str(i + 1) for i in range(options.repeat)]
    if options.repeat > 1:
        RunDirectory.create(path)
    directories = [RunDirectory.create(each) for each in paths]
    outcomes: list[Outcome] = []
    try:
        machine, workload = _prepare(options, observer)
        for index, directory in enumerate(directories):
            observer.stage(
                f"Replaying {workload.name}" + (f", run {index + 1}" if options.repeat > 1 else "")
            )
            outcomes.append(_run_once(options, machine, workload, directory, observer, index))
            if outcomes[-1].record.run["status"] != "complete":
                break
    except Exception as error:
        told = explained(error)
        if told is error:
            raise
        raise told from error
    finally:
        for each in [*reversed(paths), path]:
            if each.is_dir() and not any(each.iterdir()):
                each.rmdir()
    return outcomes


def default_directory(options: RunOptions) -> Path:
    """runs/<utc>-<workload>-<backend>, with a number where that is taken."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = Path(options.workload).name.split(".")[0].replace(":", "-")
    base = Path("runs") / f"{stamp}-{name}-{options.backend}"
    for suffix in itertools.count():
        path = base if suffix == 0 else base.with_name(f"{base.name}-{suffix}")
        if not path.exists():
            return path
    raise AssertionError("unreachable")


def _prepare(options: RunOptions, observer: Observer) -> tuple[_Machine, Workload]:
    from backbench.backends.interface.device import detect
    from backbench.backends.registry import load
    from backbench.engine.config import EngineConfig
    from backbench.engine.engine import Engine
    from backbench.engine.models.checkpoint import find_model

    if options.interpret:
        _interpret()
    device = detect(interpret=options.interpret)
    on_cpu = device.torch_device.type == "cpu"
    config = EngineConfig(**({"max_step_tokens": CPU_STEP_TOKENS} if on_cpu else {}) | options.engine)
    for name in {options.backend, *options.overrides.values()} - {"auto"}:
        load(name)
    observer.stage("Preparing the workload")
    source = find_model(options.model)
    workload = make_workload(options, source, device, config.max_len)
    accelerator = describe_accelerator(device)
    idle_bytes = memory.idle_device_bytes(device)
    observer.stage(f"Loading {options.model}")
    engine = Engine.open(
        source,
        backend=options.backend,
        device=device,
        dtype=_dtype(options.dtype),
        config=config,
        overrides=options.overrides,
    )
    require_fit(workload, engine)
    observer.stage("Warming up")
    warm_up_s = warm_up(engine, workload)
    peaks = measure_peaks(device, engine.decoder.dtype)
    return _Machine(device, source, engine, idle_bytes, peaks, accelerator, warm_up_s), workload


def warm_up(engine: Engine, workload: Workload) -> float:
    """Compile and capture what the workload's kinds of sampling need; returns the seconds it took."""
    from backbench.engine.request import SamplingParams

    kinds = {float(request.temperature > 0) for request in workload.requests}
    return sum(engine.warm_up(SamplingParams(temperature=kind)) for kind in sorted(kinds))


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """Keep what lives for the whole run out of the garbage collector's walks while time is measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _interpret() -> None:
    """Triton reads this when kernels are decorated, so it is set before any backend is imported."""
    import os

    os.environ["TRITON_INTERPRET"] = "1"


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import torch

    return getattr(torch, name)


def make_workload(options: RunOptions, source: ModelSource, device: Device, max_len: int | None) -> Workload:
    """The realised workload, sized for the device where nothing was said."""
    from backbench.workloads.catalogue import make
    from backbench.workloads.catalogue import names as catalogue
    from backbench.workloads.options import WorkloadOptions

    load = dict(options.load)
    on_cpu = device.torch_device.type == "cpu"
    defaults = {entry.name: entry for entry in catalogue()}.get(options.workload)
    if defaults is not None:
        if (
            "num_requests" in defaults.options
            and "num_requests" not in load
            and "num_requests" in defaults.defaults
        ):
            load["num_requests"] = CPU_REQUESTS if on_cpu else GPU_REQUESTS
        offered = {"rate", "arrival", "concurrency", "time_scale", "all_at_once"} & load.keys()
        if not offered and "concurrency" in defaults.defaults:
            load["concurrency"] = CPU_CONCURRENCY if on_cpu else GPU_CONCURRENCY
    config = source.config
    context = config.max_len if max_len is None else min(max_len, config.max_len)
    if "dataset" in load or Path(options.workload).is_file():
        tokenizer = source.tokenizer()
        load["tokenize"] = lambda text: tokenizer.encode(text, add_special_tokens=False)
    return make(
        options.workload,
        WorkloadOptions(seed=options.seed, vocab_size=config.vocab_size, max_len=context, **load),
    )


def describe_accelerator(device: Device) -> dict[str, Any]:
    """What the driver says of the GPU, before this process takes it; empty without one."""
    if device.vendor not in ("nvidia", "amd"):
        return {}
    try:
        index = device.torch_device.index or 0
        sensor = NvmlSensor(index) if device.vendor == "nvidia" else AmdSmiSensor(index)
    except (ImportError, OSError, RuntimeError):
        return {}
    facts = sensor.describe()
    sensor.close()
    return facts


def require_fit(workload: Workload, engine: Engine) -> None:
    """HarnessError when a request can never be served: better now than in the middle of a run."""
    config = engine.config
    assert config.max_len is not None and config.num_blocks is not None
    for request in workload.requests:
        length = len(request.prompt) + request.output_tokens
        if length > config.max_len:
            raise HarnessError(
                f"Request {request.id} needs {len(request.prompt)} prompt + {request.output_tokens} output "
                f"tokens, more than the context of {config.max_len}; raise --max-len."
            )
        blocks = -(-length // engine.pool.block_size)
        if blocks > config.num_blocks:
            raise HarnessError(
                f"Request {request.id} needs {blocks} KV blocks and the pool has {config.num_blocks}; "
                "raise --num-blocks or choose shorter requests."
            )


def _run_once(
    options: RunOptions,
    machine: _Machine,
    workload: Workload,
    directory: RunDirectory,
    observer: Observer,
    index: int,
) -> Outcome:
    engine = machine.engine
    engine.reset_prefix_cache()
    engine.take_step_stats()
    target = EngineTarget(engine)
    count = default_warmup(workload) if options.warmup is None else options.warmup
    warmup = salted_warmup(workload, count, engine.model_config.vocab_size, options.seed)
    index_of_device = machine.device.torch_device.index or 0
    telemetry = Telemetry(*open_sensors(machine.device.vendor, index_of_device))
    started = datetime.now(UTC)
    with telemetry, collector_at_rest():
        done = replay(
            target, workload, warmup=warmup, on_progress=lambda progress: observer.progress(progress, target)
        )
    observer.idle()
    if done.failure is not None:
        target.steps.extend(engine.take_step_stats())
    requests = request_frame(done)
    steps = step_frame(target.steps, done.start_ns)
    samples = telemetry_frame(telemetry.rows, done.start_ns)
    directory.write_requests(requests)
    directory.write_steps(steps)
    directory.write_telemetry(samples)
    context = make_context(options, machine, workload, done)
    computed = compute(requests, steps, context)
    whole, steady = windows(requests, context)
    tokens = energy.tokens_in(computed["metrics"], whole, steady)
    record = RunRecord(
        run=sections.run_section(options, done, started, index),
        workload=sections.workload_section(workload, context),
        model=machine.source.describe() | {"dtype": str(engine.decoder.dtype).removeprefix("torch.")},
        engine=engine.describe(),
        backend=sections.backend_section(options, engine),
        system=provenance.system(machine.device, machine.accelerator),
        software=provenance.software(),
        memory=explained_memory(
            memory.section(
                engine.memory(), machine.device, machine.idle_bytes, samples, reachable=done.failure is None
            ),
            on_gpu=context.gpus > 0,
        ),
        energy=energy.section(
            samples, steady, whole, tokens, telemetry.reasons, machine.accelerator.get("idle_power_w")
        ),
        correctness={"passed": None, "reason": "the run ended before the check"},
        metrics=computed["metrics"],
        schedule=computed["schedule"],
        roofline=computed["roofline"],
        warmup={
            "seconds": machine.warm_up_s,
            "requests": len(warmup),
            "salted": True,
            "drained": done.mode == "all_at_once",
        },
    )
    foreign = machine.accelerator.get("processes")
    # Written before the check, so that an interruption there loses no measurement.
    record = _finish(directory, record, samples, foreign)
    if done.interrupted:
        return Outcome(directory, record, None if done.failure is None else explained(done.failure))
    observer.stage("Checking results against the torch backend")
    try:
        checked = correctness.check(engine, machine.source)
    except KeyboardInterrupt:
        record = replace(record, run=record.run | {"status": "interrupted"})
        return Outcome(directory, _finish(directory, record, samples, foreign))
    return Outcome(directory, _finish(directory, replace(record, correctness=checked), samples, foreign))


def _finish(directory: RunDirectory, record: RunRecord, telemetry: Any, foreign: int | None) -> RunRecord:
    """Judge, sign and write the record."""
    error = record.run.get("error")
    found = validity.reasons(
        record.metrics,
        record.schedule,
        record.correctness,
        telemetry,
        foreign,
        error,
        bool(record.system["device"].get("interpreter")),
    )
    record = sign(directory, replace(record, validity=found))
    directory.write_record(record)
    return record


def default_warmup(workload: Workload) -> int:
    """A closed loop's whole concurrency, so that its burst at the start is no measured request's; else 16."""
    return min(MOST_WARMUP, workload.concurrency or OPEN_WARMUP, len(workload.requests))


def make_context(options: RunOptions, machine: _Machine, workload: Workload, done: Replay) -> Context:
    """What the metrics need besides the tables."""
    from backbench.workloads.statistics import ideal_prefix_hit_ratio

    engine = machine.engine
    return Context(
        mode=mode_of(workload),
        end_ns=done.end_ns - done.start_ns,
        interrupted=done.interrupted,
        batch_limit=engine.config.max_seqs,
        concurrency=workload.concurrency,
        gpus=0 if machine.device.vendor == "cpu" else 1,
        slo_s=dict(options.slo_s),
        ideal_prefix_hit_ratio=ideal_prefix_hit_ratio(
            (request.prompt for request in workload.requests), engine.pool.block_size
        ),
        shape=asdict(model_shape(engine.model_config, engine.decoder.dtype)),
        peaks=asdict(machine.peaks),
    )
