"""A server as a target: what is sent, what is stamped, and what every fault over HTTP becomes.

Times here are of a real clock, and the server's faults are real ones of a socket. Nothing may hang: each
test has a timeout far below the suite's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from faulty_server import DONE, Exchange, FaultyServer, event, usage

from backbench.errors import HarnessError
from backbench.harness.replay import Replay, replay
from backbench.harness.subjects.url.bodies import Bodies
from backbench.harness.subjects.url.channel import ClientSettings
from backbench.harness.subjects.url.servers import SERVERS
from backbench.harness.subjects.url.target import Clients, UrlTarget
from backbench.workloads.request import Request, Workload

pytestmark = pytest.mark.timeout(60)

SHORT_S = 0.4
"""Timeouts of the tests that wait for one."""
SLACK_S = 5.0
"""What a busy machine may add to them."""


def settings(url: str, **limits: float) -> ClientSettings:
    waits = {"connect_timeout_s": 5.0, "first_token_timeout_s": 10.0, "token_timeout_s": 10.0}
    return ClientSettings(url + "/completions", **(waits | limits))  # type: ignore[arg-type]


@contextmanager
def target_of(server: FaultyServer, processes: int = 1, **limits: float) -> Iterator[UrlTarget]:
    with Clients(settings(server.url, **limits), processes) as clients:
        yield UrlTarget(clients, Bodies(SERVERS["vllm"], "completions", "small").encode)


def workload(count: int, tokens: int = 3, concurrency: int | None = None) -> Workload:
    requests = tuple(Request(i, 0, (i + 1, 2, 3, 4), tokens, seed=i) for i in range(count))
    return Workload("test", requests, concurrency)


def replayed(handler: Any, count: int = 4, concurrency: int | None = 2, **limits: float) -> Replay:
    with FaultyServer(handler) as server, target_of(server, **limits) as target:
        return replay(target, workload(count, concurrency=concurrency))


async def right(exchange: Exchange) -> None:
    await exchange.whole()


def test_a_right_server(recwarn: Any) -> None:
    with FaultyServer(right) as server, target_of(server) as target:
        before = time.perf_counter_ns()
        done = replay(target, workload(5, concurrency=2))
        after = time.perf_counter_ns()
    assert done.failure is None
    for trace in done.traces:
        assert trace.finished and trace.sent_ns is not None and trace.end_ns is not None
        assert sum(count or 0 for count in trace.chunk_tokens) == 3
        assert trace.usage_tokens == 3
        stamps = [trace.intended_ns, trace.sent_ns, *trace.chunk_ns, trace.end_ns]
        assert before <= stamps[0] and stamps == sorted(stamps) and stamps[-1] <= after
    assert target.usage == {
        "requests": 5,
        "requests_with_usage": 5,
        "prompt_tokens": 20,
        "completion_tokens": 15,
    }
    body = server.bodies[0]
    assert body == {
        "model": "small",
        "prompt": [1, 2, 3, 4],
        "max_tokens": 3,
        "temperature": 0.0,
        "seed": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
    }


def test_connections_are_used_again() -> None:
    with FaultyServer(right) as server, Clients(settings(server.url), 1) as clients:
        target = UrlTarget(clients, Bodies(SERVERS["vllm"], "completions", "small").encode)
        replay(target, workload(12, concurrency=2))
        (report,) = clients.reports()
    assert report["connections"] == 2
    assert report["chunks"] >= 12


def test_a_token_is_stamped_when_it_arrives_and_a_role_is_no_token() -> None:
    async def slow(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.send(event(""))
        await asyncio.sleep(0.15)
        await exchange.send(event(" a", **usage(1)))
        await asyncio.sleep(0.1)
        await exchange.send(event(" b c", **usage(3)) + event(None, **usage(3)) + DONE)
        await exchange.end()

    (trace,) = replayed(slow, count=1).traces
    assert trace.sent_ns is not None
    first, second = ((at - trace.sent_ns) / 1e9 for at in trace.chunk_ns)
    assert trace.chunk_tokens == [1, 2]
    assert 0.15 <= first < 0.24, "not at the empty chunk, and not with the second one"
    assert 0.25 <= second < 0.5


def test_uncounted_chunks_are_known_by_the_total_or_not_at_all() -> None:
    async def one_each(exchange: Exchange) -> None:
        await exchange.whole(counted=False)

    async def merged(exchange: Exchange) -> None:
        await exchange.begin()
        for _ in range(2):
            await exchange.send(event(" a b"))
            await asyncio.sleep(0.01)
        await exchange.send(event(None, **usage(3)) + DONE)
        await exchange.end()

    async def silent(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.send(event(" a") + DONE)
        await exchange.end()

    for trace in replayed(one_each).traces:
        assert (sum(count or 0 for count in trace.chunk_tokens), trace.usage_tokens) == (3, 3)
    for trace in replayed(merged).traces:
        assert (trace.chunk_tokens, trace.usage_tokens) == ([None, None], 3)
    for trace in replayed(silent).traces:
        assert (trace.chunk_tokens, trace.usage_tokens, trace.finished) == ([None], None, True)


def test_ids_of_generated_tokens_are_kept() -> None:
    async def with_ids(exchange: Exchange) -> None:
        choice = {"index": 0, "text": " a", "token_ids": [7, 8], "finish_reason": "length"}
        await exchange.begin()
        await exchange.send(event(None, choices=[choice]) + DONE)
        await exchange.end()

    (trace,) = replayed(with_ids, count=1).traces
    assert (trace.token_ids, trace.chunk_tokens) == ([7, 8], [2])


async def refuse(exchange: Exchange) -> None:
    await exchange.status("500 Internal Server Error", b'{"error": {"message": "out of memory"}}')


async def too_many(exchange: Exchange) -> None:
    await exchange.status("429 Too Many Requests", b"", "Retry-After: 1\r\n")


async def no_stream(exchange: Exchange) -> None:
    await exchange.status("200 OK", b'{"choices": [{"text": "a"}]}')


async def reset_at_once(exchange: Exchange) -> None:
    exchange.reset()


async def close_at_once(exchange: Exchange) -> None:
    exchange.close()


async def reset_in_the_middle(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await asyncio.sleep(0.05)
    exchange.reset()


async def close_in_the_middle(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await asyncio.sleep(0.05)
    exchange.close()


async def end_early(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await exchange.end()


async def no_json(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await exchange.send(b'data: {"choices": [{"te\n\n')


async def no_event(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(b"<html>502 Bad Gateway</html>\n")


async def bad_chunk(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await exchange.raw(b"zz\r\nnot a length\r\n")


async def bad_http(exchange: Exchange) -> None:
    await exchange.raw(b"\x00\x01\x02 nonsense\r\n\r\n")


async def says_error(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await exchange.send(b'data: {"error": {"message": "engine died"}}\n\n')


async def never(exchange: Exchange) -> None:
    await asyncio.sleep(30)


async def only_comments(exchange: Exchange) -> None:
    await exchange.begin()
    while True:
        await exchange.send(b": keep-alive\n\n")
        await asyncio.sleep(0.05)


async def stall(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.send(event(" a", **usage(1)))
    await asyncio.sleep(30)


async def drip(exchange: Exchange) -> None:
    await exchange.begin()
    for number in range(1, 1000):
        await exchange.send(event(" a", **usage(number)))
        await asyncio.sleep(0.05)


FAULTS = {
    refuse: "HTTP 500: out of memory",
    too_many: "HTTP 429",
    no_stream: "the answer is no stream of events but application/json",
    reset_at_once: "connection lost: Connection reset by peer",
    close_at_once: "the server closed the connection before it answered",
    reset_in_the_middle: "the connection ended in the middle of the answer",
    close_in_the_middle: "the connection ended in the middle of the answer",
    end_early: "the stream ended before the answer did",
    no_json: "malformed stream: an event that is no chunk of an answer",
    no_event: "malformed stream: a line that belongs to no event",
    bad_chunk: "malformed HTTP",
    bad_http: "malformed HTTP",
    says_error: "the server failed: engine died",
}
WAITS = {
    never: ("no token within 0.4 s (--first-token-timeout)", {"first_token_timeout_s": SHORT_S}),
    only_comments: ("no token within 0.4 s (--first-token-timeout)", {"first_token_timeout_s": SHORT_S}),
    stall: ("no further token within 0.4 s (--token-timeout)", {"token_timeout_s": SHORT_S}),
    drip: ("not finished within 0.4 s (--request-timeout)", {"request_timeout_s": SHORT_S}),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_its_request_alone(fault: Any) -> None:
    """Every second request meets it; the others are served, on whatever connection is left."""

    async def every_second(exchange: Exchange) -> None:
        await (fault if exchange.body["seed"] % 2 else right)(exchange)

    done = replayed(every_second, count=6, concurrency=2)
    assert done.failure is None and not done.interrupted
    assert [trace.error for trace in done.traces] == [None, FAULTS[fault]] * 3
    assert all(sum(count or 0 for count in trace.chunk_tokens) == 3 for trace in done.traces[::2])


@pytest.mark.parametrize("fault", WAITS, ids=lambda fault: fault.__name__)
def test_nothing_hangs_past_its_timeout(fault: Any) -> None:
    words, limits = WAITS[fault]
    begun_s = time.monotonic()
    done = replayed(fault, count=2, concurrency=2, **limits)
    assert [trace.error for trace in done.traces] == [words] * 2
    for trace in done.traces:
        assert trace.end_ns is not None and trace.intended_ns is not None
        assert SHORT_S <= (trace.end_ns - trace.intended_ns) / 1e9 < SHORT_S + SLACK_S
    assert time.monotonic() - begun_s < 20


def test_a_server_that_nobody_can_reach() -> None:
    with FaultyServer(right) as server:
        pass  # its port is closed now
    with target_of(server, connect_timeout_s=SHORT_S) as target:
        done = replay(target, workload(3, concurrency=1))
    assert [trace.error for trace in done.traces] == ["no connection: Connection refused"] * 3


def test_a_server_killed_in_mid_run_fails_what_is_open_and_what_follows() -> None:
    served = 0

    async def dies_at_the_fourth(exchange: Exchange) -> None:
        nonlocal served
        served += 1
        if served < 4:
            await exchange.whole()
            return
        await exchange.begin()
        await exchange.send(event(" a", **usage(1)))
        await asyncio.sleep(0.05)
        exchange.server.kill_now()

    done = replayed(dies_at_the_fourth, count=8, concurrency=1)
    assert done.failure is None
    errors = [trace.error for trace in done.traces]
    assert errors[:3] == [None] * 3
    assert errors[3] == "the connection ended in the middle of the answer"
    assert errors[4:] == ["no connection: Connection refused"] * 4
    assert done.traces[3].chunk_tokens == [1], "what it had shown is kept"


def test_nothing_is_sent_twice() -> None:
    """Retries are off: a server sees each request once, whatever becomes of it."""
    with FaultyServer(reset_at_once) as server, target_of(server) as target:
        replay(target, workload(6, concurrency=2))
    assert sorted(body["seed"] for body in server.bodies) == list(range(6))


def test_a_dead_client_process_ends_the_run_and_loses_nothing() -> None:
    with FaultyServer(stall) as server, Clients(settings(server.url), 1) as clients:
        target = UrlTarget(clients, Bodies(SERVERS["vllm"], "completions", "small").encode)
        target.submit(Request(0, 0, (1,), 3))
        deadline = time.monotonic() + 10
        events = []
        while not events and time.monotonic() < deadline:
            events = target.poll(None)
        assert events[0].count == 1
        os.kill(clients._all[0].process.pid, signal.SIGKILL)
        with pytest.raises(HarnessError, match="client process has ended"):
            for _ in range(200):
                target.poll(None)
        target.abort()  # which a replay does on Ctrl-C, whatever happened before


def test_an_abort_leaves_nothing_in_flight() -> None:
    with FaultyServer(drip) as server, target_of(server) as target:
        for number in range(3):
            target.submit(Request(number, 0, (1,), 500))
        while not target.running:
            target.poll(None)
        target.abort()
        assert (target.running, target.waiting) == (0, 0)
        server.handler = right
        target.submit(Request(9, 0, (1,), 3))
        events = []
        while not any(each.finished for each in events):
            events += target.poll(None)
        assert {each.request_id for each in events} == {9}


def test_a_poll_is_back_by_its_deadline() -> None:
    with FaultyServer(never) as server, target_of(server) as target:
        target.submit(Request(0, 0, (1,), 3))
        start = time.perf_counter_ns()
        assert target.poll(start + 20_000_000) == []
        assert 20e6 <= time.perf_counter_ns() - start < 60e6 + 100e6
        assert target.poll(None) == []


def test_two_processes_share_the_requests() -> None:
    with FaultyServer(right) as server, Clients(settings(server.url), 2) as clients:
        target = UrlTarget(clients, Bodies(SERVERS["vllm"], "completions", "small").encode)
        done = replay(target, workload(20, concurrency=8))
        reports = clients.reports()
    assert all(trace.finished for trace in done.traces)
    assert all(report["chunks"] > 0 for report in reports)
