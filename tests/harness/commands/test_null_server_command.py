"""`bench null-server`: an address, answers at their times, and an end without a trace."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from backbench.harness.cli import run_command


def test_it_says_its_address_serves_and_ends() -> None:
    command = [sys.executable, "-m", "backbench", "null-server", "--tokens", "2", "--ttft", "0", "--itl", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:") and address.endswith("/v1")
        body = json.dumps({"prompt": "a", "max_tokens": 50}).encode()
        with urllib.request.urlopen(f"{address}/completions", body, timeout=10) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 2
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("wrong", [["--port", "99999"], ["--ttft", "-1"], ["--tokens", "0"], ["--itl", "x"]])
def test_wrong_settings_are_one_line(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["null-server", *wrong]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert wrong[0] in line


def test_a_port_that_is_taken_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(run_command(["null-server", "--port", str(taken.getsockname()[1])]))
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "address already in use" in line.lower() and len(line) < 300
