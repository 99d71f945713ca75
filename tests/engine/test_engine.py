"""The engine's tokens depend on the request alone: not on company, chunks, preemption, hits or forks."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from engine_fixtures import VOCAB, WordTokenizer, nothing_is_kept, open_small

from backbench.engine.engine import Engine, InFlight
from backbench.engine.models.decoder import Decoder
from backbench.engine.request import TEMPERATURES, SamplingParams
from backbench.errors import EngineError

OUTPUTS = 24


def prompts(count: int = 6, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 70))] for _ in range(count)]


def tokens_of(engine: Engine, asked: Iterable[list[int]], params: SamplingParams) -> list[list[int]]:
    return [done.token_ids for done in engine.generate(asked, params)]


GREEDY = SamplingParams(max_tokens=OUTPUTS, ignore_eos=True)
SEEDED = SamplingParams(
    max_tokens=OUTPUTS, ignore_eos=True, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7
)


@pytest.fixture(scope="module", params=[GREEDY, SEEDED], ids=["greedy", "seeded"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return request.param


@pytest.fixture(scope="module")
def alone(params: SamplingParams) -> list[list[int]]:
    """Each prompt served by itself: what every other way of serving it must equal."""
    engine = open_small(prefix_cache=False)
    return [tokens_of(engine, [prompt], params)[0] for prompt in prompts()]


def test_batched(params: SamplingParams, alone: list[list[int]]) -> None:
    assert tokens_of(open_small(), prompts(), params) == alone


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked(params: SamplingParams, alone: list[list[int]], chunk: int) -> None:
    assert tokens_of(open_small(prefill_chunk=chunk), prompts(), params) == alone


def test_a_small_budget(params: SamplingParams, alone: list[list[int]]) -> None:
    assert tokens_of(open_small(max_step_tokens=5, max_seqs=3), prompts(), params) == alone


def test_preempted(params: SamplingParams, alone: list[list[int]]) -> None:
    engine = open_small(num_blocks=25, prefix_cache=False)
    assert tokens_of(engine, prompts(), params) == alone
    assert engine.scheduler.preemptions > 0


@pytest.mark.parametrize("num_blocks", [25, 200])
def test_two_steps_in_flight(params: SamplingParams, alone: list[list[int]], num_blocks: int) -> None:
    engine = open_small(num_blocks=num_blocks)
    engine.max_steps_in_flight = 2
    assert tokens_of(engine, prompts(), params) == alone
    assert engine.pool.num_used == 0


def test_prefix_hit(params: SamplingParams, alone: list[list[int]]) -> None:
    engine = open_small()
    tokens_of(engine, prompts(), params)
    engine.take_step_stats()
    assert tokens_of(engine, prompts(), params) == alone
    assert sum(step.prefix_hit_tokens for step in engine.take_step_stats()) > 0


def test_forks_share_the_prompt_and_draw_with_their_own_seed() -> None:
    asked = prompts(2)
    params = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=11, n=3)
    engine = open_small(prefix_cache=False)
    forked = tokens_of(engine, asked, params)
    lone = open_small(prefix_cache=False)
    expected = []
    for prompt in asked:
        for index in range(3):
            one = SamplingParams(max_tokens=8, ignore_eos=True, temperature=1.0, seed=11 + index)
            expected += tokens_of(lone, [prompt], one)
    assert forked == expected
    assert engine.pool.num_used == 0
    # The prompt was computed once; a fork recomputes its last token only.
    computed = sum(step.num_tokens for step in engine.take_step_stats())
    assert computed == sum(len(prompt) for prompt in asked) + 2 * len(asked) + 6 * 7


def test_forks_on_a_tight_pool_are_preempted_and_still_equal() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=1, n=4)
    prompt = prompts()[0]
    loose, tight = open_small(), open_small(num_blocks=12)
    assert tokens_of(tight, [prompt], params) == tokens_of(loose, [prompt], params)
    assert tight.scheduler.preemptions > 0


def test_requests_join_and_leave_a_running_batch(params: SamplingParams, alone: list[list[int]]) -> None:
    engine = open_small()
    engine.max_steps_in_flight = 2
    rng = random.Random(5)
    got: dict[str, list[int]] = {}
    pending = list(enumerate(prompts()))
    doomed = {"x0", "x1"}
    for name in doomed:
        engine.add_request(name, [1, 2, 3, 4, 5], params)
    while pending or engine.has_work:
        if pending and rng.random() < 0.4:
            index, prompt = pending.pop()
            engine.add_request(str(index), prompt, params)
        if doomed and rng.random() < 0.3:
            engine.abort(doomed.pop())
        for token in engine.step():
            got.setdefault(token.request_id, []).append(token.token_id)
    assert [got[str(i)] for i in range(len(alone))] == alone
    assert engine.pool.num_used == 0


def test_eos_stop_tokens_and_length(alone: list[list[int]]) -> None:
    prompt = prompts()[0]
    engine = open_small()
    full = tokens_of(engine, [prompt], GREEDY)[0]
    stop = full[5]
    first = full.index(stop)
    done = engine.generate(
        [prompt], SamplingParams(max_tokens=OUTPUTS, ignore_eos=True, stop_token_ids=(stop,))
    )[0]
    assert (done.token_ids, done.finish_reason) == (full[: first + 1], "stop")
    eos_engine = open_small(eos=(stop,))
    done = eos_engine.generate([prompt], SamplingParams(max_tokens=OUTPUTS))[0]
    assert (done.token_ids, done.finish_reason) == (full[: first + 1], "stop")
    assert tokens_of(eos_engine, [prompt], GREEDY)[0] == full


def test_nothing_ends_a_sequence_before_min_tokens() -> None:
    prompt = prompts()[0]
    engine = open_small(tokenizer=WordTokenizer())
    full = tokens_of(engine, [prompt], GREEDY)[0]
    word = f" {full[1]} "
    for ends in ({"stop_token_ids": tuple(full)}, {"stop": (word,)}):
        for least in (0, 4, OUTPUTS):
            params = SamplingParams(max_tokens=OUTPUTS, ignore_eos=True, min_tokens=least, **ends)
            (done,) = engine.generate([prompt], params)
            assert done.token_ids == full[: len(done.token_ids)]
            assert len(done.token_ids) > least or done.finish_reason == "length"
        assert len(done.token_ids) == OUTPUTS
    eos_engine = open_small(eos=tuple(set(full)))
    (done,) = eos_engine.generate([prompt], SamplingParams(max_tokens=OUTPUTS, min_tokens=4))
    assert (done.token_ids, done.finish_reason) == (full[:5], "stop")


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_strings_end_where_the_text_first_holds_one(depth: int) -> None:
    prompt = prompts()[1]
    engine = open_small(tokenizer=WordTokenizer())
    engine.max_steps_in_flight = depth
    full = tokens_of(engine, [prompt], GREEDY)[0]
    stop = f"{full[6]} {full[7]}"
    text = " ".join(map(str, full))
    expected = next(i for i in range(1, OUTPUTS + 1) if stop in " ".join(map(str, full[:i])))
    assert stop in text
    done = engine.generate([prompt], SamplingParams(max_tokens=OUTPUTS, ignore_eos=True, stop=(stop,)))[0]
    assert done.token_ids == full[:expected]
    assert done.finish_reason == "stop"
    assert engine.pool.num_used == 0


def test_forced_tokens_are_replayed_and_scored() -> None:
    prompt = prompts()[2]
    engine = open_small()
    free = engine.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True))[0]
    forced = tuple(reversed(free.token_ids))
    replayed = engine.generate(
        [prompt], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=True, forced_tokens=forced)
    )[0]
    assert tuple(replayed.token_ids) == forced
    assert free.top_tokens == free.token_ids
    assert replayed.top_tokens[0] == free.token_ids[0]
    again = engine.generate(
        [prompt],
        SamplingParams(max_tokens=6, logprobs=True, ignore_eos=True, forced_tokens=tuple(free.token_ids)),
    )[0]
    # The same fp32 arithmetic in batches of other sizes: equal to within a few units in the last place.
    assert again.logprobs == pytest.approx(free.logprobs, abs=1e-5)


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ([], SamplingParams(), "empty prompt"),
        ([VOCAB], SamplingParams(), "outside the vocabulary"),
        ([1] * 120, SamplingParams(max_tokens=20), "more than the context of 128"),
        ([1] * 100, SamplingParams(max_tokens=20), "more than the whole pool"),
        ([1], SamplingParams(stop=("x",)), "need a tokenizer"),
        (["x"], SamplingParams(), "must be token ids"),
        ([1.0], SamplingParams(), "must be token ids"),
        ([-1], SamplingParams(), "outside the vocabulary"),
        ([1], SamplingParams(max_tokens=2, forced_tokens=(1, VOCAB)), "outside the vocabulary"),
        ([1], SamplingParams(max_tokens=2, forced_tokens=(-1, 1)), "outside the vocabulary"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(
    prompt: list[int], params: SamplingParams, said: str
) -> None:
    engine = open_small(num_blocks=20)
    with pytest.raises(EngineError, match=said) as caught:
        engine.add_request("r", prompt, params)
    assert "\n" not in str(caught.value)
    assert not engine.has_work


@pytest.mark.parametrize("name", [None, 5, ("a",), ["a"]])
def test_a_requests_id_is_a_string(name: object) -> None:
    with pytest.raises(EngineError, match="id must be a string"):
        open_small().add_request(name, [1], GREEDY)  # type: ignore[arg-type]


def test_the_coldest_temperature_gives_the_greedy_tokens() -> None:
    cold = replace(GREEDY, temperature=TEMPERATURES[0])
    assert tokens_of(open_small(), prompts(), cold) == tokens_of(open_small(), prompts(), GREEDY)


def test_min_p_alone_filters() -> None:
    """At a temperature where every token is about as likely, a high min_p leaves the greedy one."""
    hot = SamplingParams(max_tokens=8, ignore_eos=True, temperature=30.0, seed=2)
    greedy = tokens_of(open_small(), prompts(2), replace(hot, temperature=0.0))
    assert tokens_of(open_small(), prompts(2), hot) != greedy
    assert tokens_of(open_small(), prompts(2), replace(hot, min_p=0.9999)) == greedy


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_an_aborted_request_leaves_nothing_behind(depth: int, steps: int) -> None:
    """With forks and stop strings, before and after the fork; without another request the engine is idle."""
    engine = open_small(tokenizer=WordTokenizer())
    engine.max_steps_in_flight = depth
    engine.add_request("a", [1, 2, 3], replace(GREEDY, n=3, stop=("zzz",)))
    for _ in range(steps):
        engine.step()
    engine.abort("a")
    assert nothing_is_kept(engine)
    assert not engine.has_work
    assert engine.pool.num_used == 0


def test_generate_keeps_the_tokens_of_others(alone: list[list[int]], params: SamplingParams) -> None:
    engine = open_small()
    engine.max_steps_in_flight = 2
    first, second, third = prompts()[:3]
    engine.add_request("short", first, replace(params, max_tokens=3))
    engine.add_request("long", second, params)
    assert tokens_of(engine, [third], replace(params, max_tokens=9)) == [alone[2][:9]]
    assert tokens_of(engine, [third], replace(params, max_tokens=2)) == [alone[2][:2]]
    got: dict[str, list[int]] = {}
    while engine.has_work:
        for token in engine.step():
            got.setdefault(token.request_id, []).append(token.token_id)
    assert got == {"short": alone[0][:3], "long": alone[1]}


def test_a_generate_that_fails_leaves_none_of_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = open_small()
    land = engine._land

    def interrupted(landed: InFlight) -> None:
        land(landed)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_land", interrupted)
        engine.generate(prompts(), GREEDY)
    assert not engine.has_work
    assert engine.pool.num_used == 0


def test_warm_up_leaves_no_trace() -> None:
    engine = open_small()
    assert engine.warm_up(SEEDED) > 0
    assert engine.take_step_stats() == []
    assert engine.pool.num_used == 0
    prompt = [(7 * i + 33) % VOCAB for i in range(33)]
    engine.generate([prompt], GREEDY)
    assert sum(step.prefix_hit_tokens for step in engine.take_step_stats()) == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 9])
def test_warm_up_fits_the_smallest_pools(num_blocks: int) -> None:
    engine = open_small(num_blocks=num_blocks)
    engine.warm_up()
    assert engine.pool.num_used == 0


def test_step_statistics_add_up() -> None:
    engine = open_small(max_step_tokens=16)
    asked = prompts()
    engine.generate(asked, GREEDY)
    steps = engine.take_step_stats()
    outputs = len(asked) * OUTPUTS
    assert sum(step.num_tokens for step in steps) == sum(len(p) for p in asked) + outputs - len(asked)
    assert all(step.num_tokens == step.num_decodes + step.num_prefill_tokens for step in steps)
    assert max(step.num_prefill_tokens for step in steps) == 16
    assert all(step.start_ns < step.end_ns for step in steps)
    assert [step.step for step in steps] == list(range(len(steps)))
    assert steps[-1].running == 0


def test_a_pool_that_does_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(decoder: Decoder, num_blocks: int) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB.")

    monkeypatch.setattr(Decoder, "new_caches", full)
    with pytest.raises(EngineError, match=r"A pool of \d+ KV blocks, .* GiB, .*--num-blocks"):
        open_small()
