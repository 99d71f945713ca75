"""Random traffic of every kind at once: each sequence gets the tokens it gets when served alone.

Forks, prefix hits, preemption, chunks, stop strings and aborts, with one or two steps in flight, on a device
that is on time and on one that is as late as it may be.
"""

from __future__ import annotations

from typing import Any

import pytest
from engine_fixtures import VOCAB, WordTokenizer, nothing_is_kept, open_small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from late_device import keep_first, make_late
from traffic import alone, engines, serve

from backbench.engine.request import SamplingParams


@pytest.mark.parametrize(
    "device",
    [
        "on time",
        "on time, two steps in flight",
        "late",
        "late, padded as captured steps are",
        "late, graphs replayed",
    ],
)
def test_every_sequence_equals_the_same_served_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.startswith("late"):
        keep_first(monkeypatch)

    @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
    @given(engines(), st.data())
    def run(setting: dict[str, Any], data: st.DataObject) -> None:
        engine = open_small(tokenizer=WordTokenizer(), **setting)
        if device.startswith("late"):
            make_late(engine, padded="padded" in device, graphs="graphs" in device)
        elif "two" in device:
            engine.max_steps_in_flight = 2
        for asked in serve(engine, data):
            asked.check()
        assert engine.pool.num_used == 0
        assert nothing_is_kept(engine)
        told = sum(step.preemptions for step in engine.take_step_stats())
        assert told <= engine.scheduler.preemptions

    run()


def test_forks_on_a_device_that_keeps_the_first_of_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that end inside a block, sampled three times, with the default pool."""
    keep_first(monkeypatch)
    engine = make_late(open_small())
    params = SamplingParams(max_tokens=12, n=3, temperature=1.0, ignore_eos=True)
    for length in (5, 6, 7, 9, 10, 11, 13):
        prompt = tuple((5 * length + 3 * i) % VOCAB for i in range(length))
        done = engine.generate([prompt], params)
        assert [one.token_ids for one in done] == [alone(prompt, params, index)[0] for index in range(3)]
        engine.reset_prefix_cache()


def test_forks_in_a_pool_too_small_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without slices come between a fork and its first step."""
    keep_first(monkeypatch)
    engine = make_late(open_small(num_blocks=4, max_step_tokens=3, max_seqs=4))
    params = SamplingParams(max_tokens=2, n=2, temperature=1.0, ignore_eos=True)
    prompts = [tuple(range(9)), tuple(reversed(range(9)))]
    done = engine.generate(prompts, params)
    expected = [alone(prompt, params, index)[0] for prompt in prompts for index in range(2)]
    assert [one.token_ids for one in done] == expected
