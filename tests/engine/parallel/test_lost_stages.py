"""A stage that dies or hangs ends the run; on a team of its own, which does not survive that."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
from parallel_fixtures import BASE, LoudSource, in_stages, prompts

from backbench.engine.parallel.team import STILL_S
from backbench.engine.request import SamplingParams
from backbench.errors import EngineError

DEEP = replace(BASE, num_layers=4, windows=(None, 40, None, None))
WITHIN_S = 5.0


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_stage_ends_the_run_in_one_line(rank: int, how: signal.Signals) -> None:
    engine = in_stages(LoudSource(DEEP), 3)
    assert engine.ranks is not None
    team = engine.ranks.team
    for number in range(4):
        engine.add_request(str(number), prompts(97)[2], SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(5):
        engine.step()
    os.kill(team.pids[rank - 1], how)
    lost = time.monotonic()
    said = rf"Rank {rank} of 3 .* ended by SIGKILL" if how == signal.SIGKILL else rf"4 s: rank {rank}"
    with pytest.raises(EngineError, match=said) as caught:
        while engine.has_work:
            engine.step()
    assert time.monotonic() - lost < (WITHIN_S if how == signal.SIGKILL else STILL_S + 1.5)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    engine.close()
