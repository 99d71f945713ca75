"""How many streams the client carries, and what it adds to their times, on loopback.

    python benchmarks/client.py [--streams 500 1000 2000] [--itl 0.1] [--seconds 10] [--processes 1]
                                [--run 2000] [--libraries aiohttp httpx] [--out FILE.json]

Each row keeps so many streams going at once, a token each ITL, as `bench run --url` does before and after
a run: "added" is from the null server's writing a token to the client's stamp, "TTFT added" what a first
token took beyond its time inside the server, "ITL error" how far a gap between two tokens is off.
A client carries a load where neither is over 5 ms or a tenth of the ITL at the 99th percentile.

--run N replays a closed loop of N streams by `bench run` itself; its record says whether it is valid.
--libraries times one process of each HTTP library alone: seconds of CPU a token.

The client, the null server and the replay share this machine's cores; the first line says how many there are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backbench.harness import experiment
from backbench.harness.experiment import Observer
from backbench.harness.options import run_options
from backbench.harness.subjects.url.bodies import Bodies
from backbench.harness.subjects.url.calibration import Load, beyond_limit, calibrate, null_server
from backbench.harness.subjects.url.files import allow_many_files
from backbench.harness.subjects.url.null_server import MODEL, Script
from backbench.harness.subjects.url.servers import SERVERS
from backbench.harness.subjects.url.stream import Answer, EventStream
from backbench.workloads.request import Request

HEADER = (
    "streams  chunks/s  achieved  added p50/p99 ms  TTFT added p50/p99 ms  ITL error p50/p99 ms  "
    "server late p99 ms  client busy  carried"
)


def pair(values: dict[str, float | None]) -> str:
    """p50 / p99 in ms."""
    return " / ".join("-" if values[key] is None else f"{values[key] * 1e3:.2f}" for key in ("p50", "p99"))


def row(found: dict[str, Any]) -> str:
    """One load as a line of the table."""
    late, achieved = found["null_server_late_s"]["p99"], found["achieved_chunks_per_s"]
    return (
        f"{found['streams']:7,}  {found['script_chunks_per_s']:8,.0f}  {achieved or 0:8,.0f}  "
        f"{pair(found['added_token_s']):>16}  {pair(found['added_ttft_s']):>21}  "
        f"{pair(found['itl_error_s']):>20}  {(late or 0) * 1e3:18.2f}  {found['busy']:11.0%}  "
        f"{'yes' if not beyond_limit(found) else 'no'}"
    )


def ramp(streams: list[int], itl_s: float, seconds: float, processes: int) -> Iterator[dict[str, Any]]:
    """Each number of streams for `seconds`."""
    for number in streams:
        found = calibrate(Load(number, number / itl_s), processes, seconds=seconds)
        print(row(found), flush=True)
        for reason in beyond_limit(found):
            print(f"         {reason}", flush=True)
        yield found


def whole_run(streams: int, itl_s: float, processes: int, tokens: int) -> dict[str, Any]:
    """`bench run --url` with `streams` slots that a warm-up opened; answers of half to 1.5 times `tokens`."""
    with null_server(Script(0.1, itl_s)) as address, tempfile.TemporaryDirectory() as folder:
        options = run_options(
            {
                "workload": "synthetic",
                "url": address,
                "concurrency": streams,
                "num_requests": 2 * streams,
                "input_lengths": "fixed:32",
                "output_lengths": f"uniform:{tokens // 2}:{tokens * 3 // 2}",
                "warmup": streams,
                "client_processes": processes,
                "out": Path(folder) / "run",
            }
        )
        record = experiment.run(options, Observer()).record
    client, metrics = record.target["client"], record.metrics
    return {
        "streams": client["most_streams"],
        "requests": metrics["counts"],
        "peak_chunks_per_s": client["peak_chunks_per_s"],
        "ttft_p50_s": metrics["ttft_s"]["p50"]["value"],
        "tpot_p50_s": metrics["tpot_s"]["p50"]["value"],
        "script_ttft_s": 0.1,
        "script_itl_s": itl_s,
        "busy": client["busy"],
        "loop_late_s": client["loop_late_s"],
        "validity": record.validity,
    }


async def by_aiohttp(url: str, body: bytes, streams: int) -> int:
    """Read `streams` answers with aiohttp; returns the tokens."""
    import aiohttp

    async def one(session: aiohttp.ClientSession) -> int:
        answer, stream, tokens = Answer(), EventStream(), 0
        async with session.post(url, data=body, headers={"Content-Type": "application/json"}) as response:
            while received := await response.content.readany():
                tokens += sum(answer.take(event) or 0 for event in stream.feed(received))
        return tokens

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        return sum(await asyncio.gather(*(one(session) for _ in range(streams))))


async def by_httpx(url: str, body: bytes, streams: int) -> int:
    """The same with httpx."""
    import httpx

    async def one(client: httpx.AsyncClient) -> int:
        answer, stream, tokens = Answer(), EventStream(), 0
        headers = {"Content-Type": "application/json"}
        async with client.stream("POST", url, content=body, headers=headers) as response:
            async for received in response.aiter_bytes():
                tokens += sum(answer.take(event) or 0 for event in stream.feed(received))
        return tokens

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=120, trust_env=False) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(streams))))


def library_cost(name: str, streams: int, itl_s: float, seconds: float) -> dict[str, Any]:
    """Seconds of CPU a token that one process takes with one library."""
    body = Bodies(SERVERS["null"], "completions", MODEL).encode(
        Request(0, 0, tuple(range(32)), max(2, round(seconds / itl_s)))
    )
    read = {"aiohttp": by_aiohttp, "httpx": by_httpx}[name]
    with null_server(Script(0.1, itl_s)) as address:
        begun = (time.perf_counter(), time.process_time())
        tokens = asyncio.run(read(f"{address}/completions", body, streams))
        wall_s, cpu_s = time.perf_counter() - begun[0], time.process_time() - begun[1]
    found = {"library": name, "streams": streams, "tokens": tokens, "cpu_s_per_token": cpu_s / tokens}
    print(
        f"{name}: {cpu_s / tokens * 1e6:.1f} us of CPU a token, {tokens / wall_s:,.0f} tokens/s of "
        f"{streams / itl_s:,.0f}, {cpu_s / wall_s:.0%} of a core",
        flush=True,
    )
    return found | {"tokens_per_s": tokens / wall_s, "scripted_tokens_per_s": streams / itl_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="*", default=[500, 1000, 2000])
    parser.add_argument("--itl", type=float, default=0.1)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--run", type=int, metavar="STREAMS")
    parser.add_argument("--libraries", nargs="*", default=[], choices=["aiohttp", "httpx"])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    allow_many_files()
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {"cores": cores, "load_average": os.getloadavg()[0]}
    print(f"{cores} cores for client, server and replay; load average before: {found['load_average']:.2f}")
    if given.streams:
        print(HEADER)
        found["ramp"] = list(ramp(given.streams, given.itl, given.seconds, given.processes))
    if given.run:
        tokens = max(2, round(given.seconds / given.itl))
        found["run"] = whole_run(given.run, given.itl, given.processes, tokens)
        print(json.dumps(found["run"], indent=1))
    found["libraries"] = [library_cost(name, 200, 0.05, 4.0) for name in given.libraries]
    if given.out is not None:
        with contextlib.suppress(FileExistsError):
            given.out.parent.mkdir(parents=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
