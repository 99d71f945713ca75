"""Sessions as they are recorded: what follows what, after how long, and with which context."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.options import DEFAULT_CONCURRENCY, WorkloadOptions

MS = 1_000_000


def opened(path, **options):
    return make(str(path), WorkloadOptions(**options))


def turn(t, tokens, ids, out=10, took=1.0, **more):
    return {"t": t, "type": "s", "in": tokens, "out": out, "hash_ids": ids, "api_time": took, **more}


def weka(*requests, name="one", **more):
    return {
        "id": name,
        "block_size": 64,
        "hash_id_scope": "local",
        "tool_tokens": 0,
        "system_tokens": 0,
        "requests": list(requests),
        **more,
    }


SESSION = weka(
    turn(0.0, 130, [1, 2, 3]),
    turn(4.0, 200, [1, 2, 4, 5], think_time=2.5),
    turn(9.0, 150, [1, 6, 7]),
)


def write(path, *sessions):
    path.write_text("".join(json.dumps(each) + "\n" for each in sessions))
    return path


def test_weka_turns_think_and_keep_their_context(tmp_path):
    made = opened(write(tmp_path / "s", SESSION))
    assert made.concurrency == DEFAULT_CONCURRENCY
    assert [each.follows for each in made.requests] == [None, 0, 1]
    assert [each.think_ns / MS for each in made.requests] == [0, 2500, 4000], "given, or what the times leave"
    assert [each.kept_tokens for each in made.requests] == [0, 140, 64], "continued; then cut back to a block"
    first, second, third = (each.prompt for each in made.requests)
    assert [len(each) for each in (first, second, third)] == [130, 200, 150]
    assert second[:130] == first and third[:64] == first[:64] and third[64:128] != second[64:128]
    assert [each.output_tokens for each in made.requests] == [10] * 3


def test_weka_files_hold_a_session_a_line_an_array_or_one_over_many_lines(tmp_path):
    hashes = set()
    for name, text in {
        "lines": json.dumps(SESSION) + "\n",
        "array": json.dumps([SESSION]),
        "many lines": json.dumps([SESSION], indent=1),
        "one": json.dumps(SESSION, indent=2),
    }.items():
        (tmp_path / name).write_text(text)
        made = opened(tmp_path / name)
        assert made.parameters["source"]["kind"] == "weka"
        hashes.add(made.content_hash)
    assert len(hashes) == 1


def test_weka_ids_are_local_to_a_session_unless_they_say_otherwise(tmp_path):
    first = weka(turn(0, 128, [1, 2]))
    other = weka(turn(0, 128, [1, 2]), name="two")
    one, two = (each.prompt for each in opened(write(tmp_path / "s", first, other)).requests)
    assert one[:64] != two[:64]
    apart = [each | {"hash_id_scope": "global"} for each in (first, other)]
    one, two = (each.prompt for each in opened(write(tmp_path / "g", *apart)).requests)
    assert one == two


def test_weka_sessions_share_tools_and_system_prompt(tmp_path):
    agents = [weka(turn(0, 128, [1, 2]), name=str(i), tool_tokens=30, system_tokens=20) for i in range(2)]
    one, two = (each.prompt for each in opened(write(tmp_path / "s", *agents)).requests)
    assert one[:50] == two[:50] and one[50:64] != two[50:64]


def test_a_weka_subagent_runs_after_its_parents_turn_and_the_parent_waits_for_it(tmp_path):
    subagent = {"t": 1.5, "type": "subagent", "tool_tokens": 0, "system_tokens": 0}
    subagent["requests"] = [turn(1.5, 70, [8, 9]), turn(3.0, 140, [8, 10, 11], think_time=0.5)]
    made = opened(
        write(
            tmp_path / "s",
            weka(turn(0, 130, [1, 2, 3]), subagent, turn(4.2, 220, [1, 2, 4, 5], think_time=3.2)),
        )
    )
    first, inner, inner_2, last = made.requests
    assert (inner.follows, inner.think_ns / MS) == (first.id, 500), "its t less the end before it"
    assert (inner_2.follows, inner_2.extends, inner_2.think_ns / MS) == (inner.id, inner.id, 500)
    assert (last.follows, last.extends) == (inner_2.id, first.id)
    assert last.think_ns / MS == pytest.approx(200), "since the subagent ended, not since its own turn did"
    assert last.kept_tokens == 140
    assert {each.session for each in made.requests} == {"one"}


def test_session_limit_and_sampling_take_whole_sessions(tmp_path):
    agents = [weka(turn(0, 128, [1, 2]), turn(5, 200, [1, 2, 3, 4]), name=str(i)) for i in range(30)]
    path = write(tmp_path / "s", *agents)
    assert [each.session for each in opened(path, sessions=2).requests] == ["0", "0", "1", "1"]
    sampled = opened(path, sample=0.4).requests
    assert len(sampled) == 2 * len({each.session for each in sampled}) < 60


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        (weka(turn(0, 0, [])), "line 1, field requests.in"),
        (weka(turn(0, 64, [1, 2])), "line 1, field requests.hash_ids"),
        (weka(turn(-1, 64, [1])), "line 1, field requests.t"),
        (weka(turn(0, 64, [1], out=0)), "line 1, field requests.out"),
        (weka(7), "line 1, field requests"),
        (weka(turn(0, 64, [1]), turn(1, 64, [1], think_time="x")), "line 1, field requests.think_time"),
        (weka(turn(0, 64, [1])) | {"block_size": 0}, "line 1, field block_size"),
        (weka() | {"requests": 4}, "line 1, field requests"),
    ],
)
def test_a_bad_session_names_line_and_field(tmp_path, session, expected):
    path = write(tmp_path / "s", session)
    with pytest.raises(WorkloadError) as caught:
        opened(path)
    assert str(caught.value).startswith(f"{path}, {expected}")


def test_deep_subagents_are_refused_in_one_line(tmp_path):
    inner = {"type": "subagent", "requests": [turn(0, 64, [1])]}
    for _ in range(30):
        inner = {"type": "subagent", "requests": [inner]}
    with pytest.raises(WorkloadError, match="subagents more than 20 deep"):
        opened(write(tmp_path / "s", weka(inner)))


@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.integers(1, 300), st.floats(0, 30), st.booleans()),
        min_size=1,
        max_size=8,
    )
)
def test_turns_follow_an_earlier_one_whatever_the_recorded_clocks_say(tmp_path_factory, turns):
    requests = []
    for t, tokens, took, nested in turns:
        ids = list(range(-(-tokens // 64)))
        one = turn(t, tokens, ids, took=took)
        requests.append({"t": t, "type": "subagent", "requests": [one, one]} if nested else one)
    path = write(tmp_path_factory.mktemp("weka") / "s", weka(*requests))
    made = opened(path, yes=True)
    heads = 0
    for each in made.requests:
        heads += each.follows is None
        assert each.follows is None or each.follows < each.id
        assert each.extends is None or each.extends < each.id
    # Subagents before the session's first own turn have nothing to follow, and neither has that turn.
    leading = next((place for place, each in enumerate(turns) if not each[3]), len(turns))
    assert heads <= leading + 1


TRACELAB = (
    "session_id,arrival_time,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms\n"
    "b,250,0,0,40,5,0\na,0,0,0,30,10,500\na,0,1,40,8,4,100\na,0,2,20,8,4,0\n"
)


def test_tracelab_rounds_wait_for_their_tools(tmp_path):
    path = tmp_path / "s"
    path.write_text(TRACELAB)
    made = opened(path)
    assert [each.session for each in made.requests] == ["a", "b", "a", "a"]
    assert [each.arrival_ns / MS for each in made.requests] == [0, 250, 0, 0]
    assert [each.follows for each in made.requests] == [None, None, 0, 2]
    assert [each.think_ns / MS for each in made.requests] == [0, 0, 500, 100]
    assert [each.kept_tokens for each in made.requests] == [0, 0, 40, 20]
    prompts = [each.prompt for each in made.requests]
    assert [len(each) for each in prompts] == [30, 40, 48, 28]
    assert prompts[2][:30] == prompts[0] and prompts[3][:20] == prompts[0][:20]
    assert prompts[3][20:] != prompts[2][20:28]


def test_mooncake_delays_are_after_the_answer_and_times_wait_for_it(tmp_path):
    rows = [
        {"session_id": "a", "timestamp": 0, "input_length": 512, "output_length": 4, "hash_ids": [1]},
        {"session_id": "b", "timestamp": 20, "input_length": 100, "output_length": 4, "hash_ids": [3]},
        {"session_id": "a", "delay": 50.5, "input_length": 700, "output_length": 4, "hash_ids": [1, 2]},
        {"session_id": "b", "timestamp": 900, "input_length": 512, "output_length": 4, "hash_ids": [4]},
    ]
    made = opened(write(tmp_path / "s", *rows))
    assert [each.follows for each in made.requests] == [None, None, 0, 1]
    assert [each.think_ns / MS for each in made.requests] == [0, 0, 50.5, 0]
    assert [each.arrival_ns / MS for each in made.requests] == [0, 20, 0, 900]
    assert [each.kept_tokens for each in made.requests] == [0, 0, 516, 104]


def test_a_chats_turn_waits_for_its_parents_answer(tmp_path):
    def chat(number, parent, at, tokens, ids):
        found = {"chat_id": number, "parent_chat_id": parent, "timestamp": at, "input_length": tokens}
        return found | {"output_length": 8, "hash_ids": ids}

    rows = [chat(1, -1, 0.5, 40, [5, 6]), chat(2, 1, 60, 60, [5, 6, 7]), chat(3, 1, 61, 33, [5, 9])]
    made = opened(write(tmp_path / "s", *rows))
    assert [each.follows for each in made.requests] == [None, 0, 0], "an answer was asked for again"
    assert [each.arrival_ns / 1e9 for each in made.requests] == [0, 59.5, 60.5]
    assert [each.kept_tokens for each in made.requests] == [0, 48, 16]
    assert {each.session for each in made.requests} == {"1"}


def words(text):
    return [len(word) for word in text.split()]


def chats(tmp_path, *conversations):
    entries = [
        {"conversations": [{"from": role, "value": text} for role, text in turns]} for turns in conversations
    ]
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(entries))
    return path


def test_later_turns_of_conversations_are_sessions(tmp_path):
    said = [
        ("gpt", "x x"),
        ("human", "a bb ccc dddd"),
        ("gpt", "e " * 5),
        ("human", "ff ff"),
        ("gpt", "g g g"),
    ]
    path = chats(tmp_path, [*said, ("human", "h"), ("human", "i"), ("gpt", "j")])
    options = {"tokenize": words, "vocab_size": 20, "num_requests": None}
    made = opened(path, turns="10", think_ms="40", **options)
    assert [each.prompt for each in made.requests] == [
        (1, 2, 3, 4),
        (1, 2, 3, 4, 1, 1, 1, 1, 1, 2, 2),
    ], "a question without an answer ends it"
    assert [each.output_tokens for each in made.requests] == [5, 3]
    assert (made.requests[1].follows, made.requests[1].kept_tokens) == (0, 9)
    assert made.requests[1].think_ns == 40 * MS
    assert len(opened(path, turns="1", **options).requests) == 1
    alone = opened(path, **options)
    assert [each.prompt for each in alone.requests] == [(1, 2, 3, 4)]
    assert alone.requests[0].session is None
    assert len(opened(path, turns="2", max_len=12, **options).requests) == 1, "it would not fit the context"


def test_packed_lengths_have_no_later_turns():
    with pytest.raises(WorkloadError, match="knows the lengths of first turns only"):
        make("sharegpt", WorkloadOptions(turns="2"))


def test_think_times_of_sessions_without_times_can_be_capped(tmp_path):
    made = opened(write(tmp_path / "s", SESSION), max_gap_s=3)
    assert [each.think_ns / MS for each in made.requests] == [0, 2500, 3000]
    records = {each["kind"]: each for each in made.parameters["transformations"]}
    assert records["max_gap"] == {"kind": "max_gap", "seconds": 3, "turns": 1}
    path = tmp_path / "lengths"
    path.write_text("num_prefill_tokens,num_decode_tokens\n74,91\n")
    with pytest.raises(WorkloadError, match="neither times nor think times, so --max-gap"):
        opened(path, max_gap_s=3)
    with pytest.raises(WorkloadError, match="has no times, so --window does not apply"):
        opened(write(tmp_path / "s", SESSION), window_s=(0, 3))
