"""`bench serve` over sockets: segments, disconnects, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from parallel_fixtures import gone
from serving_fixtures import MAX_BODY_BYTES, tiny_engine

from backbench.engine.request import Token
from backbench.errors import EngineError, HarnessError
from backbench.harness import experiment
from backbench.harness.experiment import Observer
from backbench.harness.options import run_options
from backbench.harness.serving.app import make_app
from backbench.harness.serving.front import Front
from backbench.harness.serving.options import serve_options
from backbench.harness.serving.server import Server, listen, open_engine, serve, server_config

DATA_SEGMENTS_IN = 152
"""Where Linux's struct tcp_info counts the segments with data that came in."""
TOKEN_S = 0.006
"""Between two tokens: well below the 40 ms for which Linux delays an acknowledgement."""


class Slow:
    """The engine of all tests, whose steps take TOKEN_S at least."""

    def __init__(self) -> None:
        self._engine = tiny_engine()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, **how: bool) -> Any:
        time.sleep(TOKEN_S)
        return self._engine.step(**how)


@contextlib.contextmanager
def running(grace_s: int = 5, engine: Any = None) -> Iterator[tuple[int, Server, Front]]:
    """A server on a free port, in a thread; (its port, it, its front). engine: None = a slow one."""
    front = Front(engine or Slow(), ["tiny"], max_queue=4)
    app = make_app(front, max_body_bytes=MAX_BODY_BYTES)
    ready = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = Server(server_config(app, grace_s), front, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert ready.wait(20)
            yield port, server, front
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()
    assert tiny_engine().pool.num_used == 0 and not tiny_engine().has_work


def request_bytes(fields: dict[str, Any]) -> bytes:
    body = json.dumps({"prompt": "The first", "ignore_eos": True, "stream": True} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def settled(holds: Any, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(holds())


def refused(port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


def test_every_token_arrives_in_its_own_segment() -> None:
    """With Nagle's algorithm a token would wait for the acknowledgement of the one before it, which this
    client delays as Linux does once a connection is no longer new."""
    with running() as (port, server, _), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        client.sendall(request_bytes({"max_tokens": 30}))
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            received += client.recv(65536)
        (connection,) = server.server_state.connections
        served = connection.transport.get_extra_info("socket")
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        information = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, DATA_SEGMENTS_IN + 4)
    (num_segments,) = struct.unpack_from("I", information, DATA_SEGMENTS_IN)
    assert received.count(b'"text"') == 30
    assert num_segments > 30  # the head and the end of the answer are others


def test_the_head_is_sent_while_the_first_token_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client has read it by then, so that only the token itself is left to read."""
    may_step, real_step = threading.Event(), tiny_engine().step

    def step(**how: bool) -> list[Token]:
        assert may_step.wait(20)
        return real_step(**how)

    monkeypatch.setattr(tiny_engine(), "step", step)
    with running() as (port, _, _), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        client.sendall(request_bytes({"max_tokens": 2}))
        try:
            head = client.recv(1000)
        finally:
            may_step.set()
        assert b"200 OK" in head and head.endswith(b"\r\n\r\n") and b"data:" not in head
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += client.recv(1000)
        assert received.count(b'"text"') == 2


def test_a_client_that_hangs_up_frees_its_blocks() -> None:
    with running() as (port, _, front):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(request_bytes({"max_tokens": 200}))
        assert b"200 OK" in client.recv(100)
        assert settled(lambda: tiny_engine().pool.num_used > 0)
        client.close()
        assert settled(lambda: tiny_engine().pool.num_used == 0 and front.num_sequences == 0, 1.0)


def test_a_body_that_stops_coming_hurts_nobody() -> None:
    with running() as (port, _, front):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({})[:-5])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({"max_tokens": 2}))
            assert b"200 OK" in client.recv(100)
        assert settled(lambda: front.num_sequences == 0)


@pytest.mark.parametrize(("grace_s", "finishes"), [(20, True), (0, False)])
def test_told_to_stop_it_finishes_within_the_grace(grace_s: int, finishes: bool) -> None:
    with running(grace_s) as (port, server, _), socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        client.sendall(request_bytes({"max_tokens": 100}))
        received = client.recv(100)
        server.should_exit = True
        with contextlib.suppress(ConnectionResetError):
            while more := client.recv(65536):
                received += more
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n") == finishes
        assert settled(lambda: not server.server_state.tasks)
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port)).close()


def test_it_ends_when_the_engine_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as (port, server, front):
        monkeypatch.setattr(front.engine, "step", lambda **_: 1 / 0, raising=False)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(request_bytes({"max_tokens": 2}))
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += client.recv(1000)
            assert b"The engine failed: division by zero" in received
        assert settled(lambda: refused(port)) and not server.should_exit
        for request_id in list(tiny_engine().requests):
            tiny_engine().abort(request_id)


@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_lost_device_ends_the_server_in_one_line(busy: bool) -> None:
    asked = {"backend": "torch", "device": "cpu", "max_len": 256, "num_blocks": 64, "tp": 2}
    with open_engine(serve_options("tiny", asked)) as engine, running(engine=engine) as (port, _, front):
        assert engine.ranks is not None
        pids = engine.ranks.team.pids
        received = b""
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.settimeout(20)
            if busy:
                client.sendall(request_bytes({"max_tokens": 200}))
                assert b"200 OK" in client.recv(100)
            os.kill(pids[0], signal.SIGKILL)
            while busy and not received.endswith(b"0\r\n\r\n"):
                received += client.recv(65536)
        assert not busy or b"The engine failed: Rank 1 of 2" in received
        assert settled(lambda: refused(port), 5.0)
        assert isinstance(front.failure, EngineError)
        line = str(front.failure)
        assert line.startswith("Rank 1 of 2 (process ") and line.endswith("it was ended by SIGKILL")
    assert gone(pids)


def test_bench_run_measures_sessions_on_it(tmp_path: Path) -> None:
    """An answer is part of the next turn's prompt, so its token ids are asked for; and drafts are counted."""
    given = {"workload": "synthetic", "turns": 2, "num_requests": 6, "concurrency": 2, "warmup": 0}
    given |= {"input_lengths": "fixed:8", "output_lengths": "fixed:12", "calibrate_client": False}
    drafting = {"speculate": "synthetic:2:3", "adaptive_drafts": False, "backend": "torch", "max_len": 256}
    engine = open_engine(serve_options("tiny", drafting | {"device": "cpu", "num_blocks": 64}))
    with running(engine=engine) as (port, _, _):
        asked = given | {"url": f"http://127.0.0.1:{port}/v1", "out": tmp_path / "run"}
        record = experiment.run(run_options(asked), Observer()).record
    assert record.backend["server"] == "backbench"
    counts = record.metrics["counts"]
    assert (counts["completed"], counts["failed"]) == (counts["intended"], 0) and counts["completed"] >= 6
    assert record.target["errors"] == {}
    server = record.target["server_metrics"]
    assert server["over_the_run"]["drafted_tokens"] > server["over_the_run"]["accepted_draft_tokens"] > 0
    assert 1 < server["mean_acceptance_length"] < 4


def test_text_that_means_nothing_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(Server, "run", lambda self, sockets: None)
    asked = {"port": 0, "backend": "torch", "device": "cpu", "max_len": 64, "num_blocks": 64}
    for speculate in ("ngram:3", "synthetic:2:3"):
        serve(serve_options("tiny", asked | {"speculate": speculate}), told.append)
    assert [line for line in told if "the text means nothing" in line] == told[-1:]


def test_an_address_that_is_not_to_be_had_is_said() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(HarnessError, match="choose another --port"):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(HarnessError, match="no address of this machine"):
        listen("no.such.host.invalid", 1)


def test_options_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "port": 1,
        "ops": "torch",
        "max_seqs": 4,
        "quantize": "int8",
        "backend": None,
        "dtype": "float16",
    }
    options = serve_options("tiny", given)
    assert (options.host, options.port, options.backend) == ("127.0.0.1", 1, "auto")
    assert options.overrides == {"operations": "torch"}
    assert options.engine == {"max_seqs": 4, "quantize": "int8"}
    assert options.names() == ["tiny"]
    assert replace(options, served_model_name="a, b").names() == ["a", "b"]
    with pytest.raises(HarnessError, match="none of them empty"):
        replace(options, served_model_name="a,")
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(HarnessError, match="NO_KEY is not set"):
        replace(options, api_key_env="NO_KEY").api_key()


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from backbench.harness.commands.serve import serve

    monkeypatch.delitem(sys.modules, "backbench.harness.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = CliRunner().invoke(serve, ["tiny"])
    assert isinstance(done.exception, HarnessError) and "backbench[serve]" in str(done.exception)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "options"),
    [
        (signal.SIGTERM, []),
        (signal.SIGINT, []),
        (signal.SIGTERM, ["--tp", "2", "--speculate", "ngram:3"]),
    ],
)
def test_the_command_serves_and_ends_with_its_requests_done(
    number: signal.Signals, options: list[str]
) -> None:
    command = [sys.executable, "-m", "backbench", "serve", "tiny", "--port", "0", "-b", "torch"]
    command += ["--api-key-env", "SERVE_KEY", "--device", "cpu", "--max-len", "512", *options]
    environment = os.environ | {"SERVE_KEY": "secret"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        try:
            lines = [server.stdout.readline() for _ in range(2)]
            others = [child.pid for child in psutil.Process(server.pid).children(recursive=True)]
            assert bool(others) == bool(options)
            port = int(lines[1].split(":")[-1].removesuffix("/v1\n"))
            with socket.create_connection(("127.0.0.1", port)) as client:
                sent = request_bytes({"max_tokens": 300})
                client.sendall(sent.replace(b"host: x", b"host: x\r\nauthorization: Bearer secret"))
                received = client.recv(100)
                assert b"200 OK" in received
                server.send_signal(number)
                while more := client.recv(65536):
                    received += more
            assert received.count(b'"text"') == 300 and b"[DONE]" in received
            assert server.wait(20) == 0 and gone(others)
        finally:
            server.kill()


@pytest.mark.slow
def test_the_command_ends_with_one_line_when_a_device_is_lost() -> None:
    command = [sys.executable, "-m", "backbench", "serve", "tiny", "--port", "0", "-b", "torch"]
    command += ["--device", "cpu", "--max-len", "512", "--tp", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as server:
        assert server.stdout is not None and server.stderr is not None
        try:
            assert "Serving tiny" in [server.stdout.readline() for _ in range(2)][-1]
            (other,) = psutil.Process(server.pid).children(recursive=True)
            other.kill()
            assert server.wait(20) == 2
            (line,) = [each for each in server.stderr.read().splitlines() if each.startswith("error: ")]
            assert line.startswith("error: Rank 1 of 2 (process ") and line.endswith("ended by SIGKILL")
        finally:
            server.kill()
