"""Files as people have them become workloads, from their first request on and in their order."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.trace import TraceRow
from backbench.workloads.transform import cap_gaps, on_ticks, rebase

TICK_NS = 3_000_000_000
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_3 = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def opened(tmp_path, text: str, **options):
    path = tmp_path / "trace"
    path.write_text(text)
    return make(str(path), WorkloadOptions(max_len=4096, **options))


def arrivals_ms(workload) -> list[float]:
    return [request.arrival_ns / 1e6 for request in workload.requests]


def kinds(workload) -> dict:
    return {record["kind"]: record for record in workload.parameters["transformations"]}


def mooncake(*rows: dict) -> str:
    return "".join(json.dumps({"output_length": 4} | row) + "\n" for row in rows)


def test_a_part_of_a_trace_starts_with_its_first_request(tmp_path):
    """Otherwise one of BurstGPT's parts waits for 225 days, and a silence counts in the throughput."""
    part = BURST_3 + "19440110.0,s-1,43,GPT-4,60,12,72,x\n19440110.5,s-2,2,ChatGPT,36,9,45,x\n"
    made = opened(tmp_path, part)
    assert arrivals_ms(made) == [0, 500]
    assert kinds(made)["rebase"]["offset_s"] == 19440110.0
    assert made.schedule_s == 0.5
    later = "20,ChatGPT,100,20,120,x\n20.2,ChatGPT,50,20,70,x\n21,GPT-4,200,30,230,x\n"
    assert arrivals_ms(opened(tmp_path, BURST + later)) == [0, 200, 1000]
    assert arrivals_ms(opened(tmp_path, BURST + later, window_s=(0.1, 5))) == [0, 800]
    slice_at_600_s = mooncake(
        {"timestamp": 600_000, "input_length": 512, "hash_ids": [1]},
        {"timestamp": 601_000, "input_length": 512, "hash_ids": [1]},
    )
    assert arrivals_ms(opened(tmp_path, slice_at_600_s)) == [0, 1000]


def test_a_schedule_longer_than_a_day_needs_a_yes_and_silences_can_be_cut(tmp_path):
    text = BURST + "0,a,5,5,10,x\n10,a,5,5,10,x\n500000,a,5,5,10,x\n500001,a,5,5,10,x\n"
    with pytest.raises(WorkloadError, match=r"after 5\.8 days; shorten silences with --max-gap"):
        opened(tmp_path, text)
    assert opened(tmp_path, text, yes=True).schedule_s == 500001
    made = opened(tmp_path, text, max_gap_s=10)
    assert arrivals_ms(made) == [0, 10_000, 20_000, 21_000]
    assert kinds(made)["max_gap"] == {"kind": "max_gap", "seconds": 10, "gaps": 1, "removed_s": 499_980.0}
    assert opened(tmp_path, text, concurrency=2).schedule_s is None


def test_only_times_on_ticks_are_spread(tmp_path):
    rows = [
        {"timestamp": each, "input_length": 100 + each // 4, "hash_ids": [each]} for each in (0, 40, 277, 912)
    ]
    made = opened(tmp_path, mooncake(*rows))
    assert arrivals_ms(made) == [0, 40, 277, 912]
    assert [len(request.prompt) for request in made.requests] == [100, 110, 169, 328]
    with pytest.raises(WorkloadError, match="was not recorded on ticks of 3 s; leave out --tick"):
        opened(tmp_path, mooncake(*rows), tick="spread")
    on = [0, 0, 0, 3000, 3000, 5999, 9000]
    rows = [{"timestamp": each, "input_length": 100, "hash_ids": [1]} for each in on]
    made = opened(tmp_path, mooncake(*rows))
    assert len(set(arrivals_ms(made))) == len(on)
    assert made.parameters["source"]["tick"] == "spread"
    assert arrivals_ms(opened(tmp_path, mooncake(*rows), tick="literal")) == on


def test_order_is_kept_where_times_do_not_matter(tmp_path):
    rows = [{"timestamp": 3000, "input_length": each, "hash_ids": [1]} for each in range(10, 40)]
    for offer in ({"rate": 5.0}, {"concurrency": 4}, {"all_at_once": True}):
        made = opened(tmp_path, mooncake(*rows), **offer)
        assert [len(request.prompt) for request in made.requests] == list(range(10, 40))


def test_kin_of_mooncake(tmp_path):
    of_16 = mooncake(
        {"timestamp": 0, "input_length": 40, "hash_ids": [0, 1, 2]},
        {"timestamp": 10, "input_length": 48, "hash_ids": [0, 1, 2**64 - 1]},
    )
    made = opened(tmp_path, of_16)
    first, second = (request.prompt for request in made.requests)
    assert made.parameters["source"]["block_tokens"] == 16
    assert first[:32] == second[:32] and first[32:40] != second[32:40]
    without = mooncake({"timestamp": 0, "input_length": 40.0}, {"timestamp": 10, "input_length": 48})
    made = opened(tmp_path, without)
    assert [len(request.prompt) for request in made.requests] == [40, 48]
    assert made.parameters["source"]["block_tokens"] is None
    turns = mooncake(
        {"session_id": "a", "timestamp": 0.0, "input_length": 512, "hash_ids": [1]},
        {"session_id": "a", "delay": 50.5, "input_length": 700, "hash_ids": [1, 2]},
        {"session_id": "b", "timestamp": 20, "input_length": 100, "hash_ids": [3]},
    )
    made = opened(tmp_path, turns)
    assert arrivals_ms(made) == [0, 20, 0]
    assert [request.session for request in made.requests] == ["a", "b", "a"]
    assert [request.think_ns / 1e6 for request in made.requests] == [0, 0, 50.5]
    with pytest.raises(WorkloadError, match="line 1, field delay: there is no turn"):
        opened(tmp_path, mooncake({"session_id": "a", "delay": 1, "input_length": 5, "hash_ids": [1]}))
    with pytest.raises(WorkloadError, match=r"blocks of 1024 or 2048 tokens fit its hash_ids; give a longer"):
        opened(tmp_path, mooncake({"timestamp": 0, "input_length": 1000, "hash_ids": [1]}))
    with pytest.raises(WorkloadError, match="line 2, field hash_ids: stands on some rows only"):
        opened(
            tmp_path,
            mooncake(*({"timestamp": 0, "input_length": 5} | more for more in ({"hash_ids": [1]}, {}))),
        )


def test_lengths_without_times_or_hashes(tmp_path):
    made = opened(tmp_path, "num_prefill_tokens,num_decode_tokens,pd_ratio\n74,91,0.81\n29,90,0.32\n")
    assert made.concurrency is not None and made.schedule_s is None
    assert [len(request.prompt) for request in made.requests] == [74, 29]
    with pytest.raises(WorkloadError, match="has no times, so --window"):
        opened(tmp_path, "num_prefill_tokens,num_decode_tokens\n74,91\n", window_s=(0, 1))
    chat = {"chat_id": 1, "parent_chat_id": -1, "timestamp": 0, "input_length": 33, "output_length": 4}
    assert len(opened(tmp_path, json.dumps(chat)).requests[0].prompt) == 33


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,10,10\n"


def test_bad_rows_are_skipped_when_asked_and_counted(tmp_path):
    text = AZURE + "2024-05-10 00:00:01.0+00:00,12,0\n2024-05-10 00:00:02,12\n2024-05-10 00:00:03,9,9\n"
    with pytest.raises(WorkloadError, match="line 3, field GeneratedTokens: 0 is not between 1"):
        opened(tmp_path, text)
    made = opened(tmp_path, text, bad_rows="skip")
    assert [len(request.prompt) for request in made.requests] == [10, 9]
    skipped = made.parameters["source"]["bad_rows"]
    assert skipped["skipped"] == 2 and "line 3, field GeneratedTokens" in skipped["first"]
    assert "bad_rows" not in opened(tmp_path, AZURE, bad_rows="skip").parameters["source"]
    with pytest.raises(WorkloadError, match="has no row that is a request; the first: "):
        opened(tmp_path, AZURE.replace(",10,10", ",10,0"), bad_rows="skip")
    broken = AZURE + "2024-05-10 00:00:01,12,0\n" * 101
    with pytest.raises(WorkloadError, match="101 of 102 rows cannot be read, more than may be skipped"):
        opened(tmp_path, broken, bad_rows="skip")


def test_a_pointer_is_no_trace(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n"
    with pytest.raises(WorkloadError, match="is a Git LFS pointer, not the file it stands for; run git lfs"):
        opened(tmp_path, text)


TIMES = st.lists(st.integers(0, 10**12), min_size=1, max_size=30).map(sorted)


@given(TIMES, st.floats(0.001, 1e4))
def test_capping_keeps_order_and_short_gaps(times, longest_s):
    rows, _ = rebase([TraceRow(1, 1, time) for time in times])
    moved = list(rows)
    capped, record = cap_gaps(moved, longest_s)
    assert capped[0].arrival_ns == 0
    for before, after, one, other in zip(moved, moved[1:], capped, capped[1:], strict=False):
        gap = after.arrival_ns - before.arrival_ns
        assert other.arrival_ns - one.arrival_ns == min(gap, round(longest_s * 1e9))
    removed_ns = moved[-1].arrival_ns - capped[-1].arrival_ns
    assert record["removed_s"] == removed_ns / 1e9


@given(TIMES)
def test_ticks_are_told_without_losing_a_row(times):
    rows, found = on_ticks([TraceRow(1, 1, time) for time in times], TICK_NS)
    assert [row.arrival_ns for row in rows] == times
    assert not found or all(min(time % TICK_NS, -time % TICK_NS) <= 1_000_000 for time in times)
    ticked = [time // TICK_NS * TICK_NS for time in times]
    _, found = on_ticks([TraceRow(1, 1, time) for time in ticked], TICK_NS)
    assert found == (len(set(ticked)) < len(ticked))


def test_a_small_file_of_chats_is_taken_whole(tmp_path):
    """Not refused because fewer than the usual number pass."""
    said = ["How do I write a for loop over numbers?", "You can write for number in numbers: and go on."]
    turns = [{"from": "human", "value": said[0]}, {"from": "gpt", "value": said[1]}]
    text = json.dumps([{"id": "1", "conversations": turns}])
    made = opened(tmp_path, text, tokenize=lambda text: [len(word) for word in text.split()])
    assert [(len(request.prompt), request.output_tokens) for request in made.requests] == [(9, 10)]
    assert made.concurrency is not None
