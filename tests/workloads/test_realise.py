"""From rows to requests: who follows whom, what a prompt continues, and when it is due."""

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.draft import Draft
from backbench.workloads.options import WorkloadOptions, choose_offer
from backbench.workloads.realise import realise
from backbench.workloads.statistics import answered_tokens, ideal_prefix_hit_ratio
from backbench.workloads.trace import Follow, TraceRow, follow_recorded, named_apart

MS = 1_000_000
FIXED = {"input_lengths": "fixed:40", "output_lengths": "fixed:24"}


def synthetic(**options):
    return make("synthetic", WorkloadOptions(**options))


def realised(rows, **options):
    given = WorkloadOptions(**options)
    return realise(Draft("rows", rows, choose_offer(given, has_times=True), {}), given)


def session(*turns, name="s", think_ms=5):
    """Rows of (input, output, kept) tokens, each after the one before."""
    rows = []
    for place, (input_tokens, output_tokens, kept) in enumerate(turns):
        follow = None
        if place:
            before = f"{name}/{place - 1}"
            follow = Follow(before, think_ms * MS, before, kept)
        rows.append(TraceRow(input_tokens, output_tokens, session=name, key=f"{name}/{place}", follow=follow))
    return rows


def test_a_turn_continues_the_context_before_it():
    made = realised(session((10, 4, 0), (20, 3, 14), (15, 2, 12)))
    first, second, third = made.requests
    assert [each.follows for each in made.requests] == [None, 0, 1]
    assert [each.extends for each in made.requests] == [None, 0, 1]
    assert [each.kept_tokens for each in made.requests] == [0, 14, 12]
    assert [each.think_ns for each in made.requests] == [0, 5 * MS, 5 * MS]
    assert second.prompt[:10] == first.prompt
    assert third.prompt[:12] == second.prompt[:12]
    assert [len(each.prompt) for each in made.requests] == [10, 20, 15]
    assert made.schedule_s == 0.01
    assert made.parameters["sessions"] == {"begun": 1, "later_turns": 2}
    assert "after the answer before it ended" in made.notes[-1]


def test_a_turn_keeps_no_more_than_there_is():
    _, second = realised(session((10, 4, 0), (20, 3, 500))).requests
    assert second.kept_tokens == 14 and len(second.prompt) == 20
    clipped = realised(session((10, 4, 0), (20, 3, 14)), max_len=10, clip=True)
    assert [len(each.prompt) for each in clipped.requests] == [6, 7]
    assert clipped.requests[1].kept_tokens == 7


def test_a_turn_without_its_predecessor_waits_for_nobody():
    rows = session((10, 4, 0), (20, 3, 14), (30, 3, 23))
    made = realised(rows[1:])
    assert [each.follows for each in made.requests] == [None, 0]
    assert len(made.requests[0].prompt) == 20


def test_recorded_answers_stand_for_the_real_ones_and_others_are_drawn_alike():
    rows = session((4, 3, 0), (9, 1, 7))
    recorded = [*rows]
    recorded[0] = TraceRow(4, 3, session="s", key="s/0", prompt=(1, 2, 3, 4), answer=(5, 6, 7))
    assert realised(recorded).requests[1].prompt[:7] == (1, 2, 3, 4, 5, 6, 7)
    once, again = realised(rows), realised(rows)
    assert once.content_hash == again.content_hash
    assert once.content_hash != realised(session((4, 3, 0), (9, 1, 7), think_ms=6)).content_hash


def test_an_arrival_process_times_what_begins_a_session():
    made = synthetic(turns="3", num_requests=12, rate=2.0, arrival="constant", **FIXED)
    assert [each.arrival_ns for each in made.requests if each.follows is None] == [
        0,
        500 * MS,
        1000 * MS,
        1500 * MS,
    ]
    assert {each.arrival_ns for each in made.requests if each.follows is not None} == {0}


def test_synthetic_sessions_have_drawn_turns_and_think_times():
    made = synthetic(turns="uniform:2:5", think_ms="uniform:100:900", num_requests=400, **FIXED)
    sizes = {}
    for each in made.requests:
        sizes[each.session] = sizes.get(each.session, 0) + 1
    whole = list(sizes.values())[:-1]
    assert set(whole) == {2, 3, 4, 5}
    thinks = [each.think_ns for each in made.requests if each.follows is not None]
    assert min(thinks) >= 100 * MS and max(thinks) <= 900 * MS and len(set(thinks)) > 100
    few = synthetic(turns="uniform:2:5", think_ms="uniform:100:900", num_requests=37, **FIXED)
    assert made.requests[:37] == few.requests
    assert synthetic(turns=3, num_requests=9, **FIXED).parameters["source"]["turns"] == "fixed:3"
    with pytest.raises(WorkloadError, match="give --turns"):
        synthetic(think_ms="100")
    with pytest.raises(WorkloadError, match="length"):
        synthetic(turns="many")


def test_think_times_can_be_scaled_alone_or_with_all_times():
    rows = session((10, 4, 0), (20, 3, 14))
    rows[0] = TraceRow(10, 4, 0, session="s", key="s/0")
    later = [*rows, TraceRow(5, 5, 100 * MS)]

    def times(**options):
        requests = realised(later, **options).requests
        return requests[1].think_ns / MS, requests[2].arrival_ns / MS

    assert times() == (5, 100)
    assert times(time_scale=0.5) == (2.5, 50)
    assert times(rate_scale=4.0) == (5, 25)
    assert times(think_scale=0.0) == (0, 100)
    assert times(rate_scale=4.0, think_scale=2.0) == (10, 25)
    with pytest.raises(WorkloadError, match="--rate and --rate-scale exclude"):
        times(rate=1.0, rate_scale=2.0)


def test_lengths_scale_with_what_is_shared():
    rows = [
        TraceRow(1100, 100, block_ids=(1, 2, 3), block_tokens=512),
        TraceRow(1400, 100, block_ids=(1, 2, 4), block_tokens=512),
    ]
    made = realised(rows, length_scale=1 / 32)
    first, second = (each.prompt for each in made.requests)
    assert (len(first), len(second)) == (34, 44)
    assert first[:32] == second[:32] and first[32:] != second[32:34]
    assert [each.output_tokens for each in made.requests] == [3, 3]
    (record,) = [each for each in made.parameters["transformations"] if each["kind"] == "length_scale"]
    assert record == {"kind": "length_scale", "factor": 1 / 32, "block_tokens": {"512": 16}}
    grown = realised(session((100, 40, 0), (200, 30, 140)), length_scale=0.1)
    assert [(len(each.prompt), each.kept_tokens) for each in grown.requests] == [(10, 0), (20, 14)]


def test_too_long_a_session_is_refused_like_any_schedule():
    rows = session((10, 4, 0), (20, 3, 14), think_ms=90_000_000)
    with pytest.raises(WorkloadError, match=r"after 1\.0 days"):
        realised(rows)
    assert realised(rows, yes=True).schedule_s == 90_000


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=5
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.05, 3),
    st.none() | st.integers(8, 80),
)
def test_plans_are_consistent_whatever_is_done_to_them(sessions, length_scale, max_len):
    rows = list(
        itertools.chain.from_iterable(
            session(*turns, name=str(number)) for number, turns in enumerate(sessions)
        )
    )
    clip = {} if max_len is None else {"max_len": max_len, "clip": True}
    made = realised(rows, length_scale=length_scale, **clip)
    for request, row in zip(made.requests, rows, strict=True):
        assert request.session == row.session
        if request.follows is None:
            assert request.kept_tokens == 0 and row.follow is None
            continue
        assert request.follows == request.id - 1
        assert request.kept_tokens <= len(request.prompt)
        before = made.requests[request.follows]
        assert request.kept_tokens <= len(before.prompt) + before.output_tokens
        shared = min(request.kept_tokens, len(before.prompt))
        assert request.prompt[:shared] == before.prompt[:shared]
        assert max_len is None or len(request.prompt) + request.output_tokens <= max_len


def test_ideal_hits_of_a_session_count_what_answers_leave():
    """Blocks of 16; a turn of 64 + 40 tokens: 63 computed tokens of the context before are 3 whole blocks."""
    made = synthetic(turns="2", num_requests=2, **FIXED)
    assert [len(each.prompt) for each in made.requests] == [40, 104]
    assert answered_tokens(made.requests) == [0, 63]
    prompts = [each.prompt for each in made.requests]
    assert ideal_prefix_hit_ratio(prompts, 16, answered_tokens(made.requests)) == pytest.approx(48 / 144)
    assert ideal_prefix_hit_ratio(prompts, 16) == pytest.approx(32 / 144)


def test_recorded_blocks_tell_what_a_turn_keeps():
    before = TraceRow(40, 10, block_ids=(1, 2, 3), block_tokens=16, key="a")

    def kept(input_tokens, *ids):
        row = TraceRow(input_tokens, 5, block_ids=ids, block_tokens=16 if ids else 0)
        return follow_recorded(before, row, 0).kept_tokens

    assert kept(60, 1, 2, 9, 10) == 50, "all whole blocks and room for the answer: it goes on from there"
    assert kept(45, 1, 2, 9) == 32, "no room for the answer"
    assert kept(60, 1, 8, 9, 10) == 16, "the context was changed"
    assert kept(60, 7, 8, 9, 10) == 0
    assert kept(60) == 50
    assert kept(30) == 0


PROGRAM = (
    "from backbench.workloads.catalogue import make\n"
    "from backbench.workloads.options import WorkloadOptions\n"
    "options = WorkloadOptions(num_requests=30, turns='uniform:1:4', think_ms='lognormal:300:1', rate=3.0)\n"
    "print(make('synthetic', options).content_hash)"
)


def test_two_processes_make_the_same_sessions():
    hashes = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        hashes.add(done.stdout.strip())
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_parts_of_a_mix_keep_their_sessions_apart():
    """Both traces call their turns alike; merged turn by turn, each still follows its own."""
    parts = [
        [named_apart(row, part) for row in session((10, 4, 0), (20, 3, 14), (30, 3, 23))] for part in "ab"
    ]
    made = realised(list(itertools.chain.from_iterable(zip(*parts, strict=True))))
    assert [each.follows for each in made.requests] == [None, None, 0, 1, 2, 3]
    assert [each.session for each in made.requests] == ["a/s", "b/s"] * 3
    assert made.requests[2].prompt[:10] == made.requests[0].prompt != made.requests[1].prompt
