"""An OpenAI-compatible server as a subject: what can be known of it, and what only the client knows."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from backbench.errors import HarnessError
from backbench.harness.memory import Readings
from backbench.harness.options import OF_A_SERVER, RunOptions
from backbench.harness.provenance import redact
from backbench.harness.replay import Replay
from backbench.harness.sensors.telemetry import Sensor
from backbench.harness.subjects.subject import Facts, Limits
from backbench.harness.subjects.url import asked, calibration, scrape
from backbench.harness.subjects.url.bodies import Bodies, Tokenizer
from backbench.harness.subjects.url.calibration import Load
from backbench.harness.subjects.url.channel import ClientSettings
from backbench.harness.subjects.url.options import ServerOptions
from backbench.harness.subjects.url.target import Clients, UrlTarget
from backbench.reports.metrics.validity import BLACK_BOX, NOT_CALIBRATED
from backbench.workloads.request import Workload

NUM_REQUESTS = 512
CONCURRENCY = 64
STREAMS_PER_PROCESS = 1000
"""benchmarks/client.py measures how many one carries; half of the CPUs are left to everything else."""
GUESSED_ITL_S = 0.025
"""Before a run nobody knows how fast the server's streams will be."""
MOST_GUESSED_PER_S = 10_000.0
"""Chunks a second of all streams."""
OPEN_STREAMS = 64
"""Nor, where requests come by time, how many there will be."""
UNKNOWN_MACHINE = "the server's machine is not known here"
MOST_ERRORS = 20
"""Kinds of errors that are kept."""


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def expected_streams(workload: Workload) -> int:
    """How many requests may be in flight at once, as far as it stands before the run."""
    if workload.concurrency is not None:
        return workload.concurrency
    at_once = not any(request.arrival_ns for request in workload.requests)
    return len(workload.requests) if at_once else min(OPEN_STREAMS, len(workload.requests))


def default_processes(streams: int, cpus: int) -> int:
    """Client processes for so many streams."""
    return max(1, min(-(-streams // STREAMS_PER_PROCESS), cpus // 2))


class UrlSubject:
    """A server somewhere, reached over HTTP by client processes of this run."""

    def __init__(self, options: RunOptions) -> None:
        """Asks the server what it is; HarnessError where it does not answer or cannot be used."""
        if importlib.util.find_spec("aiohttp") is None:
            raise HarnessError(
                "This needs the client, and aiohttp is not installed: python -m pip install "
                "'backbench[client]' (in a checkout: -e '.[client]')."
            )
        self._asked_max_len: int | None = options.engine.get("max_len")
        self.options = ServerOptions(**options.server)
        self.described = asked.describe(self.options)
        self._tokenizer = None if self.options.tokenizer is None else Tokenizer(self.options.tokenizer)
        self.bodies = Bodies(
            self.described.server,
            self.options.api or "completions",
            self.described.model,
            self._tokenizer,
        )
        self._processes = self.options.client_processes or 1
        self._clients: Clients | None = None
        self._target: UrlTarget | None = None
        self._scraper: scrape.Scraper | None = None
        self._before: dict[str, Any] = {"reason": NOT_CALIBRATED}

    @property
    def clock(self) -> Callable[[], int]:
        """That of the client processes, too: one clock for all processes of a machine."""
        return time.perf_counter_ns

    def limits(self) -> Limits:
        tokenizer, described = self._tokenizer, self.described
        vocab_size = tokenizer.vocab_size if tokenizer is not None else described.vocab_size
        said = described.max_len or asked.MAX_LEN
        return Limits(
            vocab_size=self.options.url_vocab or vocab_size or asked.VOCAB_SIZE,
            max_len=said
            if self._asked_max_len is None
            else min(self._asked_max_len, described.max_len or 2**24),
            num_requests=NUM_REQUESTS,
            concurrency=CONCURRENCY,
            tokenize=None if tokenizer is None else tokenizer.encode,
            tokenize_chat=None if tokenizer is None else lambda messages: None,
        )

    def prepare(self, workload: Workload, stage: Callable[[str], None]) -> None:
        """Refuse what the server can never serve, calibrate the client, and start its processes."""
        most = self.described.max_len
        for request in workload.requests:
            length = len(request.prompt) + request.output_tokens
            if most is not None and length > most:
                raise HarnessError(
                    f"Request {request.id} needs {len(request.prompt)} prompt + {request.output_tokens} "
                    f"output tokens, and the server's context is {most}; choose shorter ones, or --max-len."
                )
        self.bodies = replace(self.bodies, token_ids=any(each.session for each in workload.requests))
        streams = expected_streams(workload)
        self._processes = self.options.client_processes or default_processes(streams, usable_cpus())
        if self.options.calibrate:
            stage(f"Measuring the client's own cost with {streams} streams")
            self._before = self._calibrate(Load(streams, min(streams / GUESSED_ITL_S, MOST_GUESSED_PER_S)))
        self._open()

    def _calibrate(self, load: Load) -> dict[str, Any]:
        return calibration.calibrate(
            load, self._processes, self.bodies.api, self.described.server.continuous_usage
        )

    def _open(self) -> None:
        options = self.options
        assert options.url is not None
        path = "/chat/completions" if self.bodies.api == "chat" else "/completions"
        settings = ClientSettings(
            options.url + path,
            asked.headers_of(options),
            options.connect_timeout_s,
            options.first_token_timeout_s,
            options.token_timeout_s,
            options.request_timeout_s,
        )
        self._clients = Clients(settings, self._processes)

    @property
    def loaded(self) -> bool:
        return True

    def facts(self) -> Facts:
        described = self.described
        return Facts(
            model={"name": described.model, "dtype": "unknown", "max_len": described.max_len},
            backend={
                "asked": OF_A_SERVER,
                "used": {},
                "server": described.kind,
                "server_title": described.server.title,
                "server_found": "stated by --server"
                if described.kind_stated
                else "by what it says of itself",
                "version": described.version,
                "reason": BLACK_BOX,
            },
            system={
                "device": {
                    "vendor": "unknown",
                    "name": "a server",
                    "arch": "unknown",
                    "reason": UNKNOWN_MACHINE,
                },
                "client": {
                    "arch": platform.machine(),
                    "cores_usable": usable_cpus(),
                    "on_the_servers_machine": self._loopback,
                },
                "os": f"{platform.system()} {platform.release()}",
            },
            batch_limit=2**31 - 1,
        )

    @property
    def _loopback(self) -> bool:
        """Whether the address is this machine's own; then client and server share its CPUs."""
        host = urlsplit(self.options.url or "").hostname or ""
        return host in ("localhost", "::1") or host.startswith("127.")

    def settings(self) -> dict[str, Any]:
        """How the server was asked."""
        options = self.options
        return {
            "url": redact(options.url or ""),
            "api": self.bodies.api,
            "requests": self.bodies.describe(),
            "server_takes": self.described.server.takes(),
            "retries": 0,
            "timeouts_s": {
                "connect": options.connect_timeout_s,
                "first_token": options.first_token_timeout_s,
                "token": options.token_timeout_s,
                "request": options.request_timeout_s,
            },
            "client_processes": self._processes,
        }

    def sensors(self) -> tuple[list[Sensor], list[str]]:
        return [], [UNKNOWN_MACHINE]

    def start(self) -> UrlTarget:
        if self._clients is None:  # a further run of the same server
            self._open()
        assert self._clients is not None
        self._clients.reports()  # counts begin anew
        url, headers = self.described.metrics_url, asked.metrics_headers(self.options)
        if url is not None:
            fetch = partial(scrape.fetch_page, url, headers)
            self._scraper = scrape.Scraper(fetch, self.described.server, self.clock)
            self._scraper.start()
        self._target = UrlTarget(self._clients, self.bodies.encode, self.clock)
        return self._target

    def finish(self, done: Replay, stage: Callable[[str], None]) -> dict[str, Any]:
        """What the client cost, in the run and against the null server, and what the server said."""
        if self._scraper is not None:
            self._scraper.stop()
        target, clients = self._target, self._clients
        assert target is not None and clients is not None
        client: dict[str, Any] = {"processes": self._processes, "calibration_before": self._before}
        reason = "the run was cut short" if done.interrupted else None
        try:
            client |= _in_the_run(clients.reports(), target, done.start_ns)
        except HarnessError as error:
            reason = str(error)
        finally:
            clients.close()
            self._clients = None
        if reason is None and not client["peak_chunks_per_s"]:
            reason = "the server gave no token"
        if not self.options.calibrate:
            reason = NOT_CALIBRATED
        after: dict[str, Any] = {"reason": reason}
        beyond: list[str] = []
        if reason is None:
            stage("Measuring the client's own cost under the load of the run")
            after, beyond = self._judged(Load(target.most_in_flight, client["peak_chunks_per_s"]), client)
        metrics = {"reason": "not asked for (--metrics-url none)"}
        return {
            "client": client | {"calibration_after": after, "beyond_limit": beyond},
            "usage": dict(target.usage),
            "errors": dict(target.errors.most_common(MOST_ERRORS)),
            "server_metrics": metrics if self._scraper is None else self._scraper.section(done.start_ns),
        }

    def _judged(self, load: Load, during: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """The client under the load of the run: its cost, and why the run was beyond its limit."""
        try:
            found = self._calibrate(load)
        except HarnessError as error:  # the run stands, but nobody knows what it is worth
            return {"reason": str(error)}, ["its own cost under this load could not be measured"]
        return found, calibration.beyond_limit(found) + beyond_in_the_run(during, found)

    def memory(self, reachable: bool = True) -> Readings:
        return Readings()

    def check(self, workload: Workload) -> dict[str, Any]:
        return {"passed": None, "reason": BLACK_BOX}

    def accuracy(self) -> dict[str, Any]:
        return {"reason": BLACK_BOX}


def _in_the_run(reports: list[dict[str, Any]], target: UrlTarget, start_ns: int) -> dict[str, Any]:
    """What the client processes did in the run; how late they were, after its warm-up."""
    return {
        "most_streams": target.most_in_flight,
        "peak_chunks_per_s": max(target.chunks_by_second.values(), default=0),
        "chunks": sum(report["chunks"] for report in reports),
        "connections_opened": sum(report["connections"] for report in reports),
        "busy": max(report["cpu_s"] / report["wall_s"] for report in reports),
        "loop_late_s": calibration.lateness(reports, start_ns),
    }


def beyond_in_the_run(during: dict[str, Any], calibrated: dict[str, Any]) -> list[str]:
    """Why the client was beyond its limit, by its own processes; empty = it was not."""
    found = []
    if during["busy"] > calibration.CORE_SHARE:
        found.append(
            f"a client process was busy for {during['busy']:.0%} of the run, {calibration.CORE_SHARE:.0%} "
            "are allowed; give it more by --client-processes, or cores of its own"
        )
    late_s, allowed_s = during["loop_late_s"]["p99"], calibration.allowed_late_s(calibrated["script_itl_s"])
    if late_s is not None and late_s > allowed_s:
        found.append(
            f"a client process came {late_s * 1e3:.1f} ms late (p99) to what was due; "
            f"{allowed_s * 1e3:.1f} ms are allowed"
        )
    return found
