"""Is a workload replayed as it was recorded: arrivals, lengths and shared prefixes, measured.

    python benchmarks/fidelity.py [--rate 200] [--timed 4000,2000] [--engine 300] [--rows azure-conv,...]

Two kinds of rows, each a whole experiment with a record; the traces are those that ship with the project.

    azure-conv, mooncake      a trace's own arrivals, scaled to `--rate` requests/s, against a target with
                              known timings on the real clock: sending lag, KS distance, lengths
    engine mooncake, engine sessions
                              lengths scaled to the bundled model `tiny`, and a prefix cache that never
                              evicts: realised prefix hits beside the ideal ones

A row is held to LIMITS; the exit code is 1 where one is exceeded.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backbench.harness import experiment
from backbench.harness.experiment import Observer
from backbench.harness.options import RunOptions
from backbench.harness.sensors.cpu import HostSensor
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.engine import EngineSubject
from backbench.harness.subjects.scripted import ScriptedSubject
from backbench.harness.subjects.target import TokenEvent
from backbench.reports.metrics.fidelity import METRICS
from backbench.workloads.packed import packed_azure, packed_mooncake
from backbench.workloads.request import Request
from backbench.workloads.trace import TraceRow

LIMITS = {"lag_p99_s": 0.002, "exact_lengths": 1.0, "prefix_hits": 0.01}
"""At most: lag at the 99th percentile, distance from the ideal hits over those. At least: exact lengths."""
FIRST_NS, EACH_NS = 30_000_000, 5_000_000
"""The timed target's answer: its first token, and every further one, after so long."""
ENGINE = {"block_size": 16, "num_blocks": 40_000, "max_seqs": 16}
"""The cache holds 640,000 tokens, more than all rows together: nothing is evicted."""


class TimedTarget:
    """Answers on the real clock, a token at a time; it sleeps in between, as a client of a server does."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.running = self.waiting = 0
        self._next: list[tuple[int, int, int]] = []
        """A heap of (when a request's next token is due, the request, tokens left with it)."""

    def submit(self, request: Request) -> int:
        now_ns = time.perf_counter_ns()
        heapq.heappush(self._next, (now_ns + FIRST_NS, request.id, request.output_tokens))
        return now_ns

    def poll(self, deadline_ns: int | None) -> list[TokenEvent]:
        wake_ns = [
            each for each in (deadline_ns, self._next[0][0] if self._next else None) if each is not None
        ]
        if wake_ns and (left_ns := min(wake_ns) - time.perf_counter_ns()) > 0:
            time.sleep(left_ns / 1e9)
        now_ns = time.perf_counter_ns()
        found = []
        while self._next and self._next[0][0] <= now_ns:
            due_ns, request_id, left = heapq.heappop(self._next)
            found.append(TokenEvent(request_id, due_ns, 1, (), left == 1))
            if left > 1:
                heapq.heappush(self._next, (due_ns + EACH_NS, request_id, left - 1))
        return found

    def abort(self) -> None:
        self._next.clear()


@dataclass
class TimedSubject(ScriptedSubject):
    """The scripted subject on the real clock, for prompts of any length."""

    max_len: int = 2**20
    vocab_size: int = 32_000
    clock: Callable[[], int] = field(default=time.perf_counter_ns)  # type: ignore[assignment]

    def sensors(self) -> tuple[list[Sensor], list[str]]:
        """What others took of the machine."""
        return [HostSensor()], []

    def start(self) -> TimedTarget:  # type: ignore[override]
        return TimedTarget()


def own_rate(rows: Iterator[TraceRow], count: int) -> float:
    """Requests a second among the first `count`."""
    times = [row.arrival_ns for row in itertools.islice(rows, count)]
    return (len(times) - 1) / ((times[-1] - times[0]) / 1e9)


def run(options: dict[str, Any], subject: Any) -> dict[str, Any]:
    """One experiment; its numbers of fidelity and lag."""
    with tempfile.TemporaryDirectory() as folder:
        given = RunOptions(out=Path(folder) / "run", warmup=0, check=False, **options)
        record = experiment.run(given, Observer(), subject).record
    lag = record.schedule["lag_s"]
    return {
        "workload": record.workload["name"],
        "counts": record.metrics["counts"],
        "offered_requests_per_s": record.schedule["offered_requests_per_s"],
        "lag_s": {key: lag[key]["value"] for key in ("p50", "p99")} | {"max": lag["max"]},
        "fidelity": {metric.path[-1]: record.metrics["fidelity"][metric.path[-1]] for metric in METRICS},
        "prefix_cache": record.metrics["prefix_cache"],
        "clip": [each for each in record.workload["parameters"]["transformations"] if each["kind"] == "clip"],
        "duration_s": record.metrics["whole_run"]["duration_s"],
        "disturbance": record.metrics["disturbance"],
        "validity": record.validity,
    }


def timed(name: str, count: int, rate: float) -> dict[str, Any]:
    """A trace at `rate` requests/s against the timed target."""
    rows = packed_mooncake() if name == "mooncake" else packed_azure(name)
    load = {"num_requests": count, "rate_scale": rate / own_rate(rows, count)}
    return run({"workload": name, "backend": "scripted", "load": load}, lambda _: TimedSubject())


def engine(load: dict[str, Any], workload: str) -> dict[str, Any]:
    """A workload on the reference engine, with a cache that holds it all."""
    options = {"workload": workload, "backend": "torch", "load": load, "engine": ENGINE, "device": "cpu"}
    return run(options, EngineSubject)


def rows_of(arguments: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    azure, mooncake = arguments.timed
    trace = {"num_requests": arguments.engine, "length_scale": 1 / 32, "rate_scale": 1.0}
    chats = {
        "num_requests": arguments.engine,
        "turns": "uniform:2:6",
        "think_ms": "uniform:20:200",
        "concurrency": 4,
        "shared_prefix": "4x128",
        "input_lengths": "lognormal:40:0.6:200",
        "output_lengths": "lognormal:24:0.6:100",
    }
    return {
        "azure-conv": lambda: timed("azure-conv", azure, arguments.rate),
        "mooncake": lambda: timed("mooncake", mooncake, arguments.rate),
        "engine mooncake": lambda: engine(trace, "mooncake"),
        "engine sessions": lambda: engine(chats, "synthetic"),
    }


def exceeded(name: str, found: dict[str, Any]) -> list[str]:
    """What of a row is beyond LIMITS."""
    fidelity, lag_s = found["fidelity"], found["lag_s"]["p99"]
    reasons = []
    if fidelity["exact_lengths"] < LIMITS["exact_lengths"]:
        reasons.append(f"only {fidelity['exact_lengths']:.2%} of the lengths are exact")
    if not name.startswith("engine") and (lag_s is None or lag_s > LIMITS["lag_p99_s"]):
        reasons.append("too few requests for a p99" if lag_s is None else f"p99 lag is {lag_s * 1e3:.2f} ms")
    if name.startswith("engine"):
        apart = fidelity["prefix_hits"] / found["prefix_cache"]["ideal"]
        if abs(apart) > LIMITS["prefix_hits"]:
            reasons.append(f"prefix hits are {apart:+.2%} from the ideal")
    return reasons


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument(
        "--timed", type=lambda text: [int(each) for each in text.split(",")], default=[4000, 2000]
    )
    parser.add_argument("--engine", type=int, default=300)
    parser.add_argument("--rows", type=lambda text: text.split(","))
    arguments = parser.parse_args()
    code = 0
    for name, measure in rows_of(arguments).items():
        if arguments.rows and name not in arguments.rows:
            continue
        found = measure()
        reasons = exceeded(name, found)
        print(json.dumps({"row": name} | found | {"exceeded": reasons}), flush=True)
        code |= bool(reasons)
    return code


if __name__ == "__main__":
    sys.exit(main())
