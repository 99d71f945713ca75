"""Beam search finds what transformers finds, on forked blocks, whatever else the engine serves."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from engine_fixtures import VOCAB, open_small
from hypothesis import given, settings
from hypothesis import strategies as st
from late_device import make_late
from transformers import AutoModelForCausalLM

from backbench.backends.interface.device import detect
from backbench.engine.beams import BeamSearch
from backbench.engine.config import EngineConfig
from backbench.engine.engine import Engine
from backbench.engine.models.checkpoint import find_model
from backbench.engine.request import Completion, SamplingParams
from backbench.errors import EngineError

TEXTS = ("It was a bright morning, and the captain walked", "The compiler checks")


@cache
def tiny() -> tuple[Engine, Any, Any]:
    """The engine, transformers' model and the tokenizer."""
    source = find_model("tiny")
    config = EngineConfig(max_seqs=8, num_blocks=128)
    engine = Engine.open(source, backend="torch", device=detect(), dtype=torch.float32, config=config)
    reference = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    return engine, reference, source.tokenizer()


def score(completion: Completion, length_penalty: float) -> float:
    return math.fsum(completion.logprobs) / len(completion.token_ids) ** length_penalty


@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (4, 0.0), (4, 2.0), (8, 1.0)])
@pytest.mark.parametrize("ending", [False, True], ids=["full length", "with ends"])
def test_sequences_and_scores_are_those_of_transformers(
    width: int, length_penalty: float, ending: bool
) -> None:
    engine, reference, tokenizer = tiny()
    ends = tuple(tokenizer(each)["input_ids"][0] for each in (",", " the")) if ending else ()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    params = SamplingParams(
        max_tokens=16,
        beams=width,
        n=width,
        length_penalty=length_penalty,
        ignore_eos=True,
        stop_token_ids=ends,
    )
    done = engine.generate(prompts, params)
    for index, prompt in enumerate(prompts):
        found = done[index * width : (index + 1) * width]
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            early_stopping=False,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=VOCAB,
            return_dict_in_generate=True,
            output_scores=True,
        )
        for completion, tokens, wanted in zip(
            found,
            expected.sequences[:, len(prompt) :].tolist(),
            expected.sequences_scores.tolist(),
            strict=True,
        ):
            length = len(completion.token_ids)
            assert completion.token_ids == tokens[:length]
            assert all(token == VOCAB for token in tokens[length:])
            assert completion.finish_reason == ("stop" if completion.token_ids[-1] in ends else "length")
            # fp32 sums of at most 16 terms below 10 in another order: 16 * 160 * 2**-24.
            assert score(completion, length_penalty) == pytest.approx(wanted, abs=2e-4)
    if ends and length_penalty <= 1:  # more favours the longest
        assert {each.finish_reason for each in done} >= {"stop"}


@given(st.data())
def test_a_search_as_wide_as_the_tree_finds_the_best_sequence(data: st.DataObject) -> None:
    """Three tokens, one of which ends a sequence: all that can be said is tried one by one."""
    steps = data.draw(st.integers(1, 3))
    table = st.lists(st.floats(-5, -0.01), min_size=3, max_size=3)
    logprob: dict[tuple[int, ...], list[float]] = {
        prefix: data.draw(table)
        for length in range(steps)
        for prefix in itertools.product((1, 2), repeat=length)
    }
    search = BeamSearch(27, steps, end_tokens=frozenset({0}), length_penalty=0.0)
    while True:
        candidates = [[(token, logprob[each.token_ids][token]) for token in range(3)] for each in search.live]
        if not search.advance(candidates):
            break
    whole = [
        (*prefix, last)
        for length in range(steps)
        for prefix in itertools.product((1, 2), repeat=length)
        for last in ((0,) if length < steps - 1 else (0, 1, 2))
    ]

    def total(tokens: tuple[int, ...]) -> float:
        return sum(logprob[tokens[:i]][token] for i, token in enumerate(tokens))

    best, found = search.finished[0]
    assert best == pytest.approx(max(map(total, whole)))
    assert total(found.token_ids) == pytest.approx(best)
    assert len(search.finished) == min(27, len(whole))


def test_blocks_are_shared_and_all_returned() -> None:
    engine = open_small(num_blocks=64, prefix_cache=False)
    prompt = [(5 * i) % VOCAB for i in range(41)]
    engine.generate([prompt], SamplingParams(max_tokens=8, beams=4, ignore_eos=True))
    unshared, held = engine.requests.peak_beam_blocks
    # 41 + 7 computed tokens take 12 blocks, of which the 10 full ones of the prompt are every beam's.
    assert unshared == 4 * 12
    assert 12 < held <= 10 + 4 * 2
    assert engine.describe()["beam_blocks_peak"] == held
    assert engine.peak_blocks_used <= 10 + 4 * 2 + 1
    assert engine.pool.num_used == 0 and not engine.has_work


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> list[list[int]]:
    engine = open_small(prefix_cache=False)
    return [each.token_ids for each in engine.generate([prompt], params)]


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_search_among_other_requests_finds_what_it_finds_alone(data: st.DataObject) -> None:
    """Chunks, preemptions, prefix hits, aborts, places taken by others, one or two steps in flight."""
    engine = open_small(
        num_blocks=data.draw(st.sampled_from([28, 40, 200])),
        max_seqs=data.draw(st.sampled_from([3, 4, 8])),
        max_step_tokens=data.draw(st.sampled_from([3, 7, 96])),
        prefix_cache=data.draw(st.booleans()),
    )
    if data.draw(st.booleans()):
        make_late(engine, padded=data.draw(st.booleans()))
    lengths = st.integers(1, 24)
    asked: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
    got: dict[str, dict[int, list[int]]] = {}
    aborted: set[str] = set()
    to_come = data.draw(st.integers(1, 5))
    while to_come or engine.has_work:
        action = data.draw(st.sampled_from(["add", "step", "step", "step", "abort"]))
        if action == "add" and to_come:
            to_come -= 1
            name = str(len(asked))
            prompt = tuple((3 * i) % VOCAB for i in range(data.draw(lengths)))
            beams = data.draw(st.sampled_from([1, 2, 3]))
            params = SamplingParams(
                max_tokens=data.draw(st.sampled_from([1, 2, 9])),
                beams=beams,
                n=data.draw(st.integers(1, beams)),
                ignore_eos=True,
                stop_token_ids=(40, 41) if beams > 1 and data.draw(st.booleans()) else (),
            )
            asked[name] = prompt, params
            got[name] = {}
            engine.add_request(name, prompt, params)
        elif action == "abort" and asked and data.draw(st.integers(0, 5)) == 0:
            name = data.draw(st.sampled_from(sorted(asked)))
            engine.abort(name)
            if name not in got or len(got[name]) < asked[name][1].n:
                aborted.add(name)
        elif engine.has_work:
            for token in engine.step():
                got[token.request_id].setdefault(token.sequence, []).append(token.token_id)
        engine.pool.check()
    assert engine.pool.num_used == 0
    for name, (prompt, params) in asked.items():
        if name not in aborted:
            found = [tokens for _, tokens in sorted(got[name].items())]
            wanted = alone(prompt, params)
            assert found == wanted if params.beams > 1 else wanted[0][: len(found[0])] == found[0]


@pytest.mark.parametrize("late", [False, True], ids=["on time", "late"])
def test_beams_that_are_preempted_at_any_moment(late: bool) -> None:
    """As an earlier request that grows would: beams that wait for others, that compute again, and their
    parents."""
    prompt = (0, 3, 6)
    params = SamplingParams(max_tokens=9, beams=3, n=3, ignore_eos=True)
    wanted = alone(prompt, params)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        engine = open_small(num_blocks=40, max_seqs=4, max_step_tokens=6, prefix_cache=False)
        if late:
            make_late(engine)
        engine.add_request("search", prompt, params)
        found: dict[int, list[int]] = {}
        for _ in range(2000):
            if not engine.has_work:
                break
            running = engine.scheduler.running
            if running and rng.random() < 0.3:
                engine.scheduler._preempt(running[rng.integers(len(running))])
            for token in engine.step():
                found.setdefault(token.sequence, []).append(token.token_id)
            engine.pool.check()
        assert [tokens for _, tokens in sorted(found.items())] == wanted, f"seed {seed}"
        assert engine.pool.num_used == 0


def test_a_beam_that_computes_its_tokens_again_is_waited_for() -> None:
    """One beam is heard while the other is still computing its tokens again. Then both are preempted, and
    sample in one step, in which the other lands first: what the one will say again is still to come. (It is
    among those that go on: one that is dropped there says nothing.)"""
    prompt, params = (0, 3, 6), SamplingParams(max_tokens=14, beams=2, n=2, ignore_eos=True)
    wanted = alone(prompt, params)
    engine = open_small(max_seqs=3, max_step_tokens=20, prefix_cache=False)
    s, schedule, sampled = engine.scheduler, engine.scheduler.schedule, list[list[Any]]()

    def noted() -> Any:
        plan = schedule()
        sampled.append([part.sequence for part in plan.slices if part.samples])
        return plan

    s.schedule = noted  # type: ignore[method-assign]
    engine.add_request("first", [5] * 8, SamplingParams(max_tokens=40, ignore_eos=True))
    engine.add_request("search", prompt, params)
    found: dict[int, list[int]] = {}
    beams: list[Any] = []
    both = False
    while engine.has_work:
        if not beams and len(s.running) == 3 and len(s.running[1].token_ids) == 10:
            first, *beams = s.running
            s._preempt(beams[1])
            s._preempt(first)  # takes most of the next step, and leaves too little for the whole beam
        elif beams and not both:
            both = True
            for each in beams:
                s._preempt(each)
        for token in engine.step():
            if token.request_id == "search":
                found.setdefault(token.sequence, []).append(token.token_id)
    assert [first, *beams[::-1]] in sampled
    assert [tokens for _, tokens in sorted(found.items())] == wanted


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"temperature": 1.0}, "takes no temperature"),
        ({"stop": ("a",)}, "no temperature, stop"),
        ({"min_tokens": 2}, "min_tokens or"),
        ({"n": 5}, r"n \(5\) must not exceed beams \(4\)"),
        ({"length_penalty": 1e9}, "length_penalty must lie in"),
    ],
)
def test_what_does_not_go_together_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        SamplingParams(**{"beams": 4, "max_tokens": 4} | changed)


def test_a_search_that_cannot_be_held_is_refused() -> None:
    engine = open_small(num_blocks=16, max_seqs=4)
    with pytest.raises(EngineError, match="8 beams, more than --max-seqs 4"):
        engine.add_request("a", [1, 2], SamplingParams(max_tokens=2, beams=8))
    with pytest.raises(EngineError, match="needs 32 KV blocks"):
        engine.add_request("a", [1] * 25, SamplingParams(max_tokens=8, beams=4))
    engine = open_small(num_blocks=200, max_seqs=64)
    with pytest.raises(EngineError, match="64 beams, too many for a vocabulary of 97"):
        engine.add_request("a", [1], SamplingParams(max_tokens=2, beams=64))
    assert not engine.has_work
