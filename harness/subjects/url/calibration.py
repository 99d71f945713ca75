"""What the client itself costs: the same load against a server whose times are known.

Each token of the null server says when it was written, by the clock that stamps it here. The delay from there
to the stamp is the client's own (with the kernel's); what a token came late into the world is the server's.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from backbench.errors import HarnessError
from backbench.harness.subjects.url.bodies import Bodies
from backbench.harness.subjects.url.channel import ClientSettings, Seen
from backbench.harness.subjects.url.null_server import MODEL, Script
from backbench.harness.subjects.url.scrape import fetch_page
from backbench.harness.subjects.url.servers import SERVERS
from backbench.harness.subjects.url.target import Clients, start_python
from backbench.workloads.request import Request

MODULE = "backbench.harness.subjects.url.null_server"
SECONDS = 2.0
"""How long every stream is kept going."""
TTFT_S = 0.1
SHORTEST_ITL_S, LONGEST_ITL_S = 0.002, 0.25
"""Faster streams are made slower, and there are more of them; slower ones faster, which is a harder load."""
MOST_STREAMS = 4096
OPENING_S = 1e-3
"""Between two streams that begin: opening a connection takes a few tenths of it."""
CORE_SHARE = 0.8
"""Of a core's time that a client process may take: beyond it, what is due waits for what was due before."""
LEAST_LATE_S = 0.005
"""A time slice of an operating system's scheduler, which no client is master of."""
LATE_OF_ITL = 0.10
"""A client that is late by less of the time between two tokens does not blur them."""


@dataclass(frozen=True)
class Load:
    """What a client has to carry."""

    streams: int
    chunks_per_s: float
    """Of all streams."""
    prompt_tokens: int = 32

    @property
    def itl_s(self) -> float:
        """Between two chunks of one stream."""
        return self.streams / self.chunks_per_s

    def feasible(self) -> Load:
        """The nearest load that is no lighter, that the null server's clock resolves, and that ends soon."""
        streams = min(MOST_STREAMS, max(self.streams, math.ceil(SHORTEST_ITL_S * self.chunks_per_s)))
        return replace(self, streams=streams, chunks_per_s=max(self.chunks_per_s, streams / LONGEST_ITL_S))


@contextlib.contextmanager
def null_server(script: Script) -> Iterator[str]:
    """A null server in a process of its own; yields its address, which ends in /v1."""
    arguments = ["-m", MODULE, "--ttft", str(script.ttft_s), "--itl", str(script.itl_s)]
    process = start_python(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise HarnessError("The null server did not start; see what it wrote above.")
        yield address
    finally:
        process.terminate()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def calibrate(
    load: Load, processes: int, api: str = "completions", continuous: bool = True, seconds: float = SECONDS
) -> dict[str, Any]:
    """Carry `load` for about `seconds` against a null server; returns what the client added, in seconds."""
    load = load.feasible()
    tokens = max(2, round(seconds / load.itl_s))
    server = replace(SERVERS["null"], continuous_usage=continuous)
    bodies = Bodies(server, "completions", MODEL)
    path = "/chat/completions" if api == "chat" else "/completions"
    with null_server(Script(TTFT_S, load.itl_s)) as address:
        settings = ClientSettings(address + path, first_token_timeout_s=30.0, token_timeout_s=30.0)
        with Clients(settings, processes) as clients:
            begun_ns = time.perf_counter_ns()
            failed, chunk_ns = _carry(clients, bodies, load, tokens, api)
            took_s = (time.perf_counter_ns() - begun_ns) / 1e9
            reports = clients.reports()
        late = _server_stats(address)
    return _summary(load, tokens, processes, reports, late) | {
        "failed": failed,
        "seconds": took_s,
        "achieved_chunks_per_s": _rate(chunk_ns, load),
    }


def _carry(clients: Clients, bodies: Bodies, load: Load, tokens: int, api: str) -> tuple[int, list[int]]:
    """Send every stream, spread over one gap between tokens, and wait for all; failures and chunk times."""
    prompt = tuple(1 + place % 900 for place in range(load.prompt_tokens))
    body = bodies.body(Request(0, 0, prompt, tokens))
    if api == "chat":
        body["messages"] = [{"role": "user", "content": " ".join(map(str, body.pop("prompt")))}]
    content = json.dumps(body, separators=(",", ":")).encode()
    spread_s = max(load.itl_s, load.streams * OPENING_S)
    start_s = time.perf_counter()
    seen: list[Seen] = []
    sent = ended = failed = 0
    chunk_ns: list[int] = []
    while ended < load.streams:
        due = min(load.streams, 1 + int((time.perf_counter() - start_s) / spread_s * load.streams))
        while sent < due:
            clients.send(sent, content)
            sent += 1
        seen = clients.seen(0.001 if sent < load.streams else 0.05)
        for each in seen:
            if each.finished:
                ended += 1
                failed += each.error is not None
            else:
                chunk_ns.append(each.time_ns)
    return failed, chunk_ns


def _rate(chunk_ns: list[int], load: Load) -> float | None:
    """Chunks a second in the middle half of the time, where every stream runs."""
    if len(chunk_ns) < 8:
        return None
    low, high = np.quantile(chunk_ns, (0.25, 0.75))
    return float((len(chunk_ns) / 2) / ((high - low) / 1e9)) if high > low else None


def _server_stats(address: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fetch_page(address.removesuffix("/v1") + "/stats", {}))
    return found


def _summary(
    load: Load, tokens: int, processes: int, reports: list[dict[str, Any]], late: dict[str, Any]
) -> dict[str, Any]:
    joined = {
        name: np.array([each for report in reports for each in report[name]], dtype=np.float64) / 1e9
        for name in ("first_delays_ns", "delays_ns", "gap_errors_ns")
    }
    chunks = sum(report["chunks"] for report in reports)
    cpu_s = sum(report["cpu_s"] for report in reports)
    return {
        "streams": load.streams,
        "tokens": tokens,
        "script_ttft_s": TTFT_S,
        "script_itl_s": load.itl_s,
        "script_chunks_per_s": load.chunks_per_s,
        "processes": processes,
        "added_ttft_s": quantiles(joined["first_delays_ns"]),
        "added_token_s": quantiles(joined["delays_ns"]),
        "itl_error_s": quantiles(joined["gap_errors_ns"]),
        "loop_late_s": lateness(reports),
        "null_server_late_s": {"p50": late.get("late_p50_s"), "p99": late.get("late_p99_s")},
        "cpu_s_per_chunk": cpu_s / chunks if chunks else None,
        "busy": max(report["cpu_s"] / report["wall_s"] for report in reports),
        "most_chunks_per_s": processes * CORE_SHARE * chunks / cpu_s if chunks and cpu_s else None,
    }


def lateness(reports: list[dict[str, Any]], since_ns: int = 0) -> dict[str, float | None]:
    """How late the processes came to what was due, from `since_ns` of the clock on."""
    beats = [late_ns for report in reports for at_ns, late_ns in report["beats_ns"] if at_ns >= since_ns]
    return quantiles(np.array(beats, dtype=np.float64) / 1e9)


def quantiles(values_s: Any) -> dict[str, float | None]:
    """p50, p99 and the largest of an array of seconds."""
    if not len(values_s):
        return {"p50": None, "p99": None, "max": None}
    p50, p99 = np.quantile(values_s, (0.5, 0.99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values_s.max())}


def allowed_late_s(itl_s: float) -> float:
    """What a client may be late by at the 99th percentile where tokens come every `itl_s`."""
    return max(LEAST_LATE_S, LATE_OF_ITL * itl_s)


def beyond_limit(calibrated: dict[str, Any]) -> list[str]:
    """Why the client does not carry this load; empty = it does."""
    if calibrated["failed"]:
        return [f"{calibrated['failed']} of {calibrated['streams']} streams failed against the null server"]
    allowed_s = allowed_late_s(calibrated["script_itl_s"])
    found = []
    for name, words in (("added_token_s", "a token's time"), ("added_ttft_s", "the first token's time")):
        late_s = calibrated[name]["p99"]
        if late_s is None or late_s > allowed_s:
            shown = "nothing known" if late_s is None else f"{late_s * 1e3:.1f} ms"
            found.append(
                f"the client alone adds {shown} (p99) to {words} with {calibrated['streams']:,} streams and "
                f"{calibrated['script_chunks_per_s']:,.0f} chunks/s; {allowed_s * 1e3:.1f} ms are allowed"
            )
    return found
