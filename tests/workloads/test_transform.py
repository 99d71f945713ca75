from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.workloads import transform
from backbench.workloads.packed import packed_mooncake
from backbench.workloads.readers.mooncake import TICK_NS
from backbench.workloads.statistics import gap_cv
from backbench.workloads.trace import Follow, TraceRow

SECOND_NS = 1_000_000_000


def rows_at(*seconds: float) -> list[TraceRow]:
    return [TraceRow(10, 5, round(second * SECOND_NS)) for second in seconds]


def arrivals(rows) -> list[int]:
    return [row.arrival_ns for row in rows]


def test_scale_and_window():
    scaled, record = transform.scale_time(rows_at(0, 1, 4), 0.5)
    assert arrivals(scaled) == [0, SECOND_NS // 2, 2 * SECOND_NS]
    assert record == {"kind": "time_scale", "factor": 0.5}
    kept, record = transform.window(rows_at(0, 1, 2, 3, 4), 1, 3)
    assert arrivals(kept) == [0, SECOND_NS]
    assert record == {"kind": "window", "start_s": 1, "end_s": 3}


def test_a_window_stops_reading_at_its_end():
    def endless():
        second = 0
        while True:
            yield from rows_at(second)
            second += 1

    assert len(list(transform.window(endless(), 2, 5)[0])) == 3


def test_sampling_is_seeded_prefix_stable_and_about_the_fraction():
    rows = rows_at(*range(4000))
    kept = arrivals(transform.sample(rows, 0.25, seed=1)[0])
    assert kept == arrivals(transform.sample(rows, 0.25, seed=1)[0])
    assert kept != arrivals(transform.sample(rows, 0.25, seed=2)[0])
    fewer = arrivals(transform.sample(rows[:1000], 0.25, seed=1)[0])
    assert kept[: len(fewer)] == fewer
    # Binomial: standard deviation sqrt(4000 * 0.25 * 0.75) = 27; four of them.
    assert abs(len(kept) - 1000) < 110


def test_sampling_and_limiting_keep_whole_sessions():
    rows = [TraceRow(1, 1, index, session=str(index % 40)) for index in range(400)]
    kept = list(transform.sample(rows, 0.5, seed=0)[0])
    counts = {row.session: 0 for row in kept}
    for row in kept:
        counts[row.session] += 1
    assert set(counts.values()) == {10}
    assert 5 < len(counts) < 35
    limited = list(transform.limit_sessions(rows, 3)[0])
    assert {row.session for row in limited} == {"0", "1", "2"}
    assert len(limited) == 30
    assert len(list(transform.limit_sessions(rows_at(0, 1, 2), 2)[0])) == 2


@given(
    lengths=st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), max_size=20),
    max_len=st.integers(2, 4000),
)
def test_clipping_fits_everything_and_counts_what_it_took(lengths, max_len):
    rows = [TraceRow(*pair) for pair in lengths]
    clipped, record = transform.clip_lengths(rows, max_len)
    for before, after in zip(rows, clipped, strict=True):
        assert after.input_tokens >= 1
        assert after.output_tokens >= 1
        assert after.input_tokens + after.output_tokens <= max_len
        if before.input_tokens + before.output_tokens <= max_len:
            assert after == before
    assert record["requests"] == sum(a != b for a, b in zip(rows, clipped, strict=True))
    lost = sum(row.input_tokens + row.output_tokens for row in rows)
    lost -= sum(row.input_tokens + row.output_tokens for row in clipped)
    assert record["input_tokens"] + record["output_tokens"] == lost


def test_clipping_takes_the_prompt_first_down_to_half():
    clipped, _ = transform.clip_lengths([TraceRow(900, 200), TraceRow(900, 900), TraceRow(10, 2000)], 1000)
    assert [(row.input_tokens, row.output_tokens) for row in clipped] == [(800, 200), (500, 500), (10, 990)]


def test_spreading_keeps_ticks_order_and_removes_the_bursts():
    literal = list(packed_mooncake())
    spread = list(transform.spread_ticks(literal, 0, TICK_NS)[0])
    moved = np.array(arrivals(spread))
    assert (np.diff(moved) >= 0).all()
    assert sorted(row.block_ids for row in spread) == sorted(row.block_ids for row in literal)
    assert gap_cv(arrivals(literal)) == pytest.approx(3.03, abs=0.01)
    # Uniform times are Poisson-like: CV 1 with standard error 1 / sqrt(12031), about 0.009; four of them,
    # and the trace's own changes of rate, which measure at most 0.02.
    assert gap_cv(moved.tolist()) == pytest.approx(1.0, abs=0.06)


def test_spreading_moves_within_the_tick_and_does_not_look_ahead():
    rows = rows_at(0, 0, 0, 3, 3, 6)
    spread = arrivals(transform.spread_ticks(rows, 4, TICK_NS)[0])
    assert [arrival // (3 * SECOND_NS) for arrival in spread] == [0, 0, 0, 1, 1, 2]
    assert arrivals(transform.spread_ticks(rows[:5], 4, TICK_NS)[0]) == spread[:5]


def test_capped_silences_cap_think_times_too():
    follow = Follow("a", 30 * SECOND_NS, "a", 0)
    rows = [TraceRow(1, 1, key="a"), TraceRow(1, 1, 30 * SECOND_NS, follow=follow)]
    capped, _ = transform.cap_gaps(rows, 2)
    assert capped[1].follow is not None and capped[1].follow.think_ns == 2 * SECOND_NS
    untimed = replace(rows[1], follow=replace(follow, think_ns=None))
    assert transform.cap_gaps([rows[0], untimed], 2)[0][1].follow == untimed.follow
