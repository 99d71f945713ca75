"""Teams of processes: calls, faults, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from parallel_fixtures import BASE, DRAFTING, LoudSource, add, fail_on, gone, interpreted, open_on, prompts

from backbench.backends.interface.device import cpu
from backbench.engine.models.checkpoint import find_model
from backbench.engine.parallel.team import STILL_S, Team
from backbench.engine.request import SamplingParams
from backbench.errors import EngineError
from backbench.harness.kernels.collectives import conform_on

WITHIN_S = 5.0
LONG = SamplingParams(max_tokens=100)


@pytest.fixture
def pair() -> Iterator[Team]:
    team = Team(2, interpreted())
    yield team
    team.close()


def test_a_call_on_everyone_and_conformance(pair: Team) -> None:
    assert pair.call(add, 2, 3) == [(0, 5), (1, 5)]
    for name, dtypes in (("torch", (torch.float32,)), ("triton", (torch.float32, torch.bfloat16))):
        for rows in pair.call(conform_on, name, "quick", dtypes):
            wrong = [row for row in rows if row.status == "wrong"]
            assert not wrong, wrong
            assert sum(row.status == "pass" for row in rows) >= 6


def test_what_a_member_says_last() -> None:
    team = Team(2, cpu())
    with pytest.raises(EngineError, match=r"Rank 1 of 2 \(process \d+\) is lost: the dog ate it"):
        team.call(fail_on, 1)
    team.close()
    assert gone(team.pids)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_killed_rank_ends_the_run_in_one_line(rank: int) -> None:
    engine = open_on(LoudSource(BASE), 4)
    assert engine.ranks is not None
    team = engine.ranks.team
    engine.add_request("a", prompts(97)[2], SamplingParams(max_tokens=60))
    for _ in range(5):
        engine.step()
    os.kill(team.pids[rank - 1], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(EngineError, match=rf"Rank {rank} of 4 .* ended by SIGKILL") as caught:
        while engine.has_work:
            engine.step()
    assert time.monotonic() - killed < WITHIN_S
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    engine.close()
    assert gone(team.pids)


def test_a_rank_that_is_killed_while_another_drafts_ends_the_run() -> None:
    engine = open_on(find_model("tiny"), 2, **DRAFTING)
    assert engine.ranks is not None
    team = engine.ranks.team
    engine.add_request("a", [1, 2, 3], SamplingParams(max_tokens=200, ignore_eos=True))
    for _ in range(4):
        engine.step()
    os.kill(team.pids[0], signal.SIGKILL)
    with pytest.raises(EngineError, match=r"Rank 1 of 2 .* ended by SIGKILL"):
        while engine.has_work:
            engine.step()
    engine.close()
    assert gone(team.pids)


def test_a_rank_that_hangs_ends_the_run() -> None:
    engine = open_on(LoudSource(BASE), 2)
    assert engine.ranks is not None
    team = engine.ranks.team
    engine.add_request("a", prompts(97)[2], SamplingParams(max_tokens=60))
    engine.step()
    os.kill(team.pids[0], signal.SIGSTOP)
    stopped = time.monotonic()
    with pytest.raises(EngineError, match=r"no answer came within 4 s: rank 1"):
        while engine.has_work:
            engine.step()
    assert STILL_S < time.monotonic() - stopped < STILL_S + 1.5
    engine.close()
    assert gone(team.pids)


@pytest.mark.parametrize("how", ["killed while the other is stopped", "both terminated"])
def test_nothing_outlives_the_first_rank(how: str, tmp_path: Path) -> None:
    code = (
        "import sys, tempfile\n"
        "from parallel_fixtures import *\n"
        "engine = open_on(LoudSource(BASE), 2)\n"
        "print(*engine.ranks.team.pids, flush=True)\n"
        "while True: engine.generate(prompts(97), KINDS[0])\n"
    )
    before = set(Path("/dev/shm").iterdir())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TMPDIR": str(tmp_path),
    }
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 1 and psutil.pid_exists(pids[0])
        assert list(tmp_path.iterdir())
        if how == "both terminated":  # as `timeout` does with a whole group
            os.kill(pids[0], signal.SIGTERM)
            process.terminate()
        else:
            os.kill(pids[0], signal.SIGSTOP)
            process.kill()
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline and not gone(pids):
        time.sleep(0.05)
    assert gone(pids)
    assert not list(tmp_path.iterdir())
    assert set(Path("/dev/shm").iterdir()) <= before
