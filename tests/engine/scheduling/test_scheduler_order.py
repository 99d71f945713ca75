"""First come, first served, and a step within its budget: as an engine's own steps tell."""

from __future__ import annotations

from engine_fixtures import open_small

from backbench.engine.engine import Engine
from backbench.engine.request import SamplingParams


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 31 + 7 * place) % 97 for place in range(length)]


def serve(engine: Engine) -> list[str]:
    """Steps until nothing is left; the requests in the order in which they ended."""
    ended: list[str] = []
    while engine.has_work:
        for token in engine.step():
            running = [sequence.order for sequence in engine.scheduler.running]
            waiting = [sequence.order for sequence in engine.scheduler.waiting]
            assert running == sorted(running), "running sequences stand in order of arrival"
            assert all(first <= later for first in running for later in waiting), "nobody was overtaken"
            if token.finish_reason is not None and token.request_id not in ended:
                ended.append(token.request_id)
    return ended


def test_prompts_under_way_and_new_ones_share_one_budget() -> None:
    """Budget 8, chunks of 5: two long prompts at once may not take 5 each, nor a new one what is not left."""
    engine = open_small(max_step_tokens=8, prefill_chunk=5, num_blocks=32)
    for number in range(3):
        engine.add_request(str(number), prompt(number, 20), SamplingParams(max_tokens=2))
    serve(engine)
    prefilled = [stats.num_prefill_tokens for stats in engine.take_step_stats()]
    assert sum(prefilled) == 60
    assert max(prefilled) == 8


def test_a_preempted_request_comes_before_those_that_never_ran() -> None:
    """Seven blocks each in a pool of eight, two places: the second is preempted while the third waits."""
    engine = open_small(num_blocks=8, max_seqs=2, prefix_cache=False)
    for number in range(3):
        engine.add_request(str(number), prompt(number, 8), SamplingParams(max_tokens=20))
    assert serve(engine) == ["0", "1", "2"]
    assert sum(stats.preemptions for stats in engine.take_step_stats()) > 0


def test_a_fork_stands_where_its_request_stands() -> None:
    """The forks of the first request start after the second one has: they are still the older ones."""
    engine = open_small(num_blocks=64)
    engine.add_request("0", prompt(0, 9), SamplingParams(max_tokens=12, n=3))
    engine.add_request("1", prompt(1, 9), SamplingParams(max_tokens=12))
    assert set(serve(engine)) == {"0", "1"}
