"""The null server keeps its script, and the client is told apart from it."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import pytest

from backbench.harness.subjects.url.calibration import (
    Load,
    allowed_late_s,
    beyond_limit,
    calibrate,
    null_server,
)
from backbench.harness.subjects.url.null_server import Script
from backbench.harness.subjects.url.stream import Answer, EventStream

pytestmark = pytest.mark.timeout(120)


def post(address: str, path: str, body: Any) -> http.client.HTTPResponse:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.request("POST", f"/v1{path}", body if isinstance(body, bytes) else json.dumps(body))
    return connection.getresponse()


def get(address: str, path: str) -> Any:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    assert response.status == 200
    return response.read()


def test_times_and_counts_are_the_scripts() -> None:
    script = Script(ttft_s=0.2, itl_s=0.05)
    asked = {"prompt": [1, 2, 3], "max_tokens": 4, "stream": True, "model": "m"}
    asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    with null_server(script) as address:
        response = post(address, "/completions", asked)
        assert response.headers["Content-Type"] == "text/event-stream"
        text = response.read()
        answer = Answer()
        written, counts = [], []
        for event in EventStream().feed(text):
            counts.append(answer.take(event))
            if answer.written_ns is not None and counts[-1]:
                written.append(answer.written_ns)
        stats = json.loads(get(address, "/stats"))
    assert counts == [1, 1, 1, 1, 0, 0]
    assert (answer.usage, answer.finish_reason, answer.done) == (
        {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
        "length",
        True,
    )
    assert answer.received_ns is not None
    late = [(at - answer.received_ns) / 1e9 - (0.2 + 0.05 * place) for place, at in enumerate(written)]
    assert min(late) >= 0, "never early"
    assert min(late) < 0.02, "on time but for what the machine was busy with"
    assert stats["tokens"] == 4 and 0 <= stats["late_p50_s"] <= stats["late_p99_s"]


def test_chat_whole_answers_and_pages() -> None:
    with null_server(Script(0.0, 0.0)) as address:
        chat = {"messages": [{"role": "user", "content": "one two"}], "max_completion_tokens": 3}
        whole = json.loads(post(address, "/chat/completions", chat).read())
        assert whole["choices"][0]["message"]["content"] == " a a a"
        assert whole["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
        streamed = post(address, "/chat/completions", chat | {"stream": True}).read()
        events = EventStream().feed(streamed)
        assert [json.loads(each)["choices"][0]["delta"]["content"] for each in events[:-1]] == [" a"] * 3
        (card,) = json.loads(get(address, "/v1/models"))["data"]
        assert card["owned_by"] == "backbench-null" and card["max_model_len"] > 4096
        assert get(address, "/health") == b"{}"
        assert b"null:request_success_total 2\n" in get(address, "/metrics")


@pytest.mark.parametrize("body", [b"{", b"[]", b"7", b'{"max_tokens": "x"}', b"\xff"])
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with null_server(Script(0.0, 0.0)) as address:
        assert post(address, "/completions", body).status == 400
        assert post(address, "/nothing", b"{}").status == 404


def test_a_client_that_leaves_is_forgotten_and_requests_come_in_pieces() -> None:
    with null_server(Script(0.0, 0.001)) as address:
        parts = urlsplit(address)
        body = json.dumps({"prompt": "a", "max_tokens": 100_000, "stream": True}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as peer:
            for piece in (head[:20], head[20:] + body[:5], body[5:]):
                peer.sendall(piece)
                time.sleep(0.02)
            assert peer.recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 5
        while b"null:num_requests_running 0\n" not in get(address, "/metrics"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_calibration_tells_what_the_client_adds() -> None:
    found = calibrate(Load(streams=4, chunks_per_s=100.0), processes=1, seconds=0.5)
    assert (found["streams"], found["tokens"], found["failed"]) == (4, 12, 0)
    assert found["script_itl_s"] == pytest.approx(0.04)
    for name in ("added_ttft_s", "added_token_s", "itl_error_s"):
        p50, p99, most = (found[name][key] for key in ("p50", "p99", "max"))
        assert 0 <= p50 <= p99 <= most
    assert found["added_token_s"]["p50"] < 0.02, "far below a gap: stamped at the token, not at the end"
    assert 0 < found["cpu_s_per_chunk"] < 0.02
    assert found["most_chunks_per_s"] > 0
    assert 0 < found["busy"] <= 1.2


def test_a_slow_client_is_found_out() -> None:
    """The same numbers with a client that stamps late."""
    found = {
        "failed": 0,
        "streams": 64,
        "script_itl_s": 0.02,
        "script_chunks_per_s": 3200.0,
        "added_token_s": {"p99": 0.001},
        "added_ttft_s": {"p99": 0.002},
    }
    assert beyond_limit(found) == []
    (reason,) = beyond_limit(found | {"added_token_s": {"p99": 0.0074}})
    assert "adds 7.4 ms (p99) to a token's time with 64 streams" in reason
    (reason,) = beyond_limit(found | {"added_ttft_s": {"p99": 0.3}})
    assert "the first token's time" in reason
    (reason,) = beyond_limit(found | {"failed": 3})
    assert "3 of 64 streams failed" in reason
    assert allowed_late_s(1.0) == 0.1 and allowed_late_s(0.01) == 0.005


def test_a_rate_that_few_streams_cannot_have_is_carried_by_more() -> None:
    assert Load(1, 5000.0).feasible() == Load(10, 5000.0)
    assert Load(64, 1.0).feasible() == Load(64, 256.0), "not a minute between two tokens"
    assert Load(100, 1000.0).feasible() == Load(100, 1000.0)
