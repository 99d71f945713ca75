"""The readers of files that hold text: ShareGPT and a user's own OpenAI log; and how a format is told."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.catalogue import make
from backbench.workloads.options import WorkloadOptions
from backbench.workloads.readers import json_array
from backbench.workloads.readers.detect import detect
from backbench.workloads.readers.json_array import read_array
from backbench.workloads.readers.openai import Log, read_openai
from backbench.workloads.readers.sharegpt import Conversation, read_sharegpt
from backbench.workloads.readers.text import BadRows


def chat(*turns: tuple[str, str]) -> dict:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


def tokenize(text: str) -> list[int]:
    return [ord(character) % 100 for character in text]


def openai_rows(path, **options) -> tuple[list, Log]:
    log = Log()
    asked = WorkloadOptions(**({"tokenize": tokenize} | options))
    return list(read_openai(path, asked, BadRows(), log)), log


def test_the_first_question_with_an_answer_is_taken(tmp_path):
    path = tmp_path / "chats.json"
    entries = [
        chat(("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")),
        chat(("gpt", "a0"), ("human", "q3"), ("gpt", "a3")),
        chat(("gpt", "only an answer")),
        chat(("system", "be kind"), ("human", "q4"), ("human", "q5"), ("gpt", "a5")),
        chat(),
        chat(("human", "no answer")),
    ]
    path.write_text(json.dumps(entries, indent=1))
    found = [(item.prompt, item.answer) for item in read_sharegpt(path)]
    assert found == [("q1", "a1"), ("q3", "a3"), ("q5", "a5")]


def test_lines_are_those_of_the_entries(tmp_path):
    path = tmp_path / "chats.json"
    entry = json.dumps(chat(("human", "q"), ("gpt", "a")))
    path.write_text(f"[\n{entry},\n\n{entry}\n]")
    assert list(read_sharegpt(path)) == [Conversation("q", "a", 2), Conversation("q", "a", 4)]


VALUES = st.recursive(
    st.none() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60)
@given(st.lists(VALUES, max_size=4), st.integers(1, 40), st.sampled_from([None, 1]))
def test_an_array_is_the_same_read_in_any_chunks(tmp_path_factory, values, chunk, indent):
    # Scalars at the top level are no conversations; objects are what a chunk may cut.
    values = [{"value": value, 'quote\\"': "é\u2028\n"} for value in values]
    path = tmp_path_factory.mktemp("array") / "array.json"
    path.write_text(json.dumps(values, indent=indent))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK_CHARACTERS", chunk)
        assert [value for _, value in read_array(path)] == values


def test_a_large_file_is_not_loaded_whole(tmp_path):
    path = tmp_path / "large.json"
    entry = json.dumps(chat(("human", "q" * 1000), ("gpt", "a" * 1000)))
    with path.open("w") as file:
        file.write("[" + ",".join([entry] * 12_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_sharegpt(path)) == 12_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 25 MB on disk; two 1 MiB chunks of one-byte characters and their copies.
    assert peak < 8_000_000


GOOD = json.dumps(chat(("human", "q"), ("gpt", "a")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"[\n{GOOD},\n" + '{"id": "x"}]', "line 3, field conversations"),
        (f"[\n{GOOD},\n7]", "line 3, field (the entry)"),
        (f"[\n{GOOD},\n" + '{"conversations": [{"from": "human"}]}]', "line 3, field conversations.value"),
        (
            f"[\n{GOOD},\n" + '{"conversations": [{"from": 1, "value": ""}]}]',
            "line 3, field conversations.from",
        ),
        (
            f"[\n{GOOD},\n" + '{"conversations": [\n{"from" "human"}]}]' + " " * 100,
            "line 4, field (the entry)",
        ),
        (f"[\n{GOOD}\n", "line 3, field (the array)"),
        (f"[\n{GOOD},\n{GOOD[:-5]}", "line 3, field (the entry)"),
        ("", "line 1, field (the array)"),
        ("7", "line 1, field (the array)"),
    ],
)
def test_a_bad_file_names_file_line_and_field(tmp_path, text, expected):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(WorkloadError) as caught:
        list(read_sharegpt(path))
    assert str(caught.value).startswith(f"{path}, {expected}")
    assert "\n" not in str(caught.value)


def test_openai_bodies(tmp_path):
    path = tmp_path / "log.jsonl"
    bodies = [
        {"prompt": [1, 2, 3], "max_tokens": 5, "timestamp": 100.5},
        {"prompt": "ab", "max_tokens": 6, "max_completion_tokens": 7, "temperature": 0.5, "timestamp": 101},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "timestamp": 101.5},
    ]
    path.write_text("\n".join(json.dumps(body) for body in bodies))
    rows, log = openai_rows(path)
    assert log.timed == 3
    assert [row.arrival_ns for row in rows] == [0, 500_000_000, 1_000_000_000]
    assert rows[0].prompt == (1, 2, 3)
    assert (rows[1].prompt, rows[1].output_tokens, rows[1].temperature) == (tuple(tokenize("ab")), 7, 0.5)
    assert rows[2].prompt == tuple(tokenize("user: hi"))


def openai_made(tmp_path, *entries: dict, **options):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(entry) for entry in entries))
    return make(str(path), WorkloadOptions(**({"tokenize": tokenize, "vocab_size": 100} | options)))


HELLO = {"messages": [{"role": "user", "content": "Name three rivers."}]}
PARTS = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Name three rivers."}]}]}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
ANSWER = {"choices": [{"message": {"content": "Rhine, Po."}}]}
BATCH = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions"}


@pytest.mark.parametrize(
    ("entry", "output_tokens"),
    [
        (HELLO | {"max_completion_tokens": None, "max_tokens": 8}, 8),
        (PARTS | {"max_tokens": 8}, 8),
        (BATCH | {"body": HELLO | {"max_tokens": 8}}, 8),
        ({"request": HELLO | {"max_tokens": 80}, "response": {"usage": {"completion_tokens": 7}}}, 7),
        (HELLO | {"max_tokens": 80, "usage": {"completion_tokens": 6}}, 6),
        (HELLO | {"response": ANSWER}, 10),
        ({"body": HELLO, "response": {"status_code": 200, "body": ANSWER}}, 10),
        (HELLO | {"response": "Rhine."}, 6),
    ],
)
def test_logs_as_they_are_recorded_replay_the_answers_real_length(tmp_path, entry, output_tokens):
    (request,) = openai_made(tmp_path, entry).requests
    assert request.prompt == tuple(tokenize("user: Name three rivers."))
    assert request.output_tokens == output_tokens


def test_answers_of_unknown_length_are_drawn_when_asked(tmp_path):
    with pytest.raises(WorkloadError, match="give --output-lengths for such rows"):
        openai_made(tmp_path, HELLO)
    made = openai_made(tmp_path, HELLO, HELLO | {"max_tokens": 3}, HELLO, output_lengths="uniform:50:60")
    assert [50 <= request.output_tokens <= 60 for request in made.requests] == [True, False, True]
    assert made.requests[1].output_tokens == 3


def test_an_array_of_requests_and_chats_one_a_line(tmp_path):
    path = tmp_path / "log.json"
    options = WorkloadOptions(tokenize=tokenize, vocab_size=100)
    path.write_text(json.dumps([HELLO | {"max_tokens": 8}] * 2, indent=1))
    assert detect(path).name == "openai"
    assert len(make(str(path), options).requests) == 2
    path.write_text(2 * (json.dumps(chat(("human", "How so?"), ("assistant", "Because it is."))) + "\n"))
    assert detect(path).name == "sharegpt"
    assert [each.answer for each in read_sharegpt(path)] == 2 * ["Because it is."]
    turns = [{"role": "user", "content": "How so?"}, {"role": "assistant", "content": "Because it is."}]
    path.write_text(json.dumps([{"conversations": turns}]))
    assert detect(path).name == "sharegpt"
    made = make(str(path), options)
    assert [request.output_tokens for request in made.requests] == [14], "a small file is taken whole"


def test_one_bad_conversation_can_be_left_out(tmp_path):
    path = tmp_path / "chats.json"
    entries = [chat(("human", "hi there"), ("gpt", None)), chat(("human", "How so?"), ("gpt", "Because."))]
    path.write_text(json.dumps(entries))
    with pytest.raises(WorkloadError, match=r"line 1, field conversations\.value"):
        make(str(path), WorkloadOptions(tokenize=tokenize, vocab_size=100))
    made = make(str(path), WorkloadOptions(tokenize=tokenize, vocab_size=100, bad_rows="skip"))
    assert len(made.requests) == 1
    assert made.parameters["source"]["bad_rows"]["skipped"] == 1


def test_tool_calls_are_text_and_pictures_are_named(tmp_path):
    called = {"messages": [*HELLO["messages"], CALL], "max_tokens": 2}
    (request,) = openai_made(tmp_path, called).requests
    assert request.prompt[-5:] == tuple(tokenize('k"}}]'))
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(WorkloadError, match="a part of type 'image_url' is no text, and only text"):
        openai_made(tmp_path, {"messages": [picture], "max_tokens": 2})


@pytest.mark.parametrize(
    "times",
    [
        (1767323045, 1767323046.5),
        (1767323045000, 1767323046500),
        (1767323045000000, 1767323046500000),
        ("2026-01-02T03:04:05Z", "2026-01-02T04:04:06.5+01:00"),
        (0, 1.5),
    ],
)
def test_times_in_any_unit_and_in_words(tmp_path, times):
    made = openai_made(tmp_path, *(HELLO | {"max_tokens": 1, "timestamp": each} for each in times))
    assert [request.arrival_ns for request in made.requests] == [0, 1_500_000_000]


def test_what_is_not_replayed_is_named_and_a_seed_is_kept(tmp_path):
    asked = HELLO | {"max_tokens": 8, "n": 2, "stop": ["."], "top_p": 0.5, "seed": 7}
    made = openai_made(tmp_path, asked, HELLO | {"max_tokens": 8, "n": 1, "stop": None})
    assert made.requests[0].seed == 7
    (note,) = made.notes
    assert "asked for and ignored: " in note
    assert all(f"{name} (1)" in note for name in ("n", "stop", "top_p"))


def test_messages_become_a_prompt_by_the_chat_template(tmp_path):
    def tokenize_chat(messages):
        return tokenize("|".join(message["content"] for message in messages) + ">")

    made = openai_made(tmp_path, HELLO | {"max_tokens": 8}, tokenize_chat=tokenize_chat)
    assert made.requests[0].prompt == tuple(tokenize("Name three rivers.>"))
    assert made.parameters["source"]["chat_template"] is True
    made = openai_made(tmp_path, HELLO | {"max_tokens": 8}, tokenize_chat=lambda messages: None)
    assert made.requests[0].prompt == tuple(tokenize("user: Name three rivers."))
    assert made.parameters["source"]["chat_template"] is False


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": "a"}, "max_tokens"),
        ({"prompt": "", "max_tokens": 1}, "prompt"),
        ({"prompt": 3, "max_tokens": 1}, "prompt"),
        ({"prompt": ["a"], "max_tokens": 1}, "prompt"),
        ({"messages": [], "max_tokens": 1}, "messages"),
        ({"messages": [{"role": "user"}], "max_tokens": 1}, "messages.content"),
        ({"prompt": "a", "max_tokens": 1, "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "max_tokens": 1, "timestamp": "now"}, "timestamp"),
    ],
)
def test_a_bad_body_names_its_field(tmp_path, body, field):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "x", "max_tokens": 1}\n' + json.dumps(body))
    with pytest.raises(WorkloadError) as caught:
        openai_rows(path)
    assert str(caught.value).startswith(f"{path}, line 2, field {field}:")


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "x", "max_tokens": 1}')
    with pytest.raises(WorkloadError, match="tokenizer"):
        openai_rows(path, tokenize=None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "azure"),
        ("Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n", "burstgpt"),
        ("id,input_len,output_len,arrival_time,round_idx,tool_wait_after_ms,prefix_len\n", "tracelab"),
        ("arrived_at,num_prefill_tokens,num_decode_tokens\n", "vidur"),
        ('\n  [\n{"id"', "sharegpt"),
        ('{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [0]}', "mooncake"),
        ('{"chat_id": 1, "hash_ids": []}', "qwen-bailian"),
        ('{"model": "m", "messages": []}', "openai"),
        ('{"timestamp": 0, "hash_ids": [0', "mooncake"),
    ],
)
def test_the_format_is_told_from_the_content(tmp_path, text, expected):
    path = tmp_path / "file.bin"
    path.write_text(text)
    assert detect(path).name == expected


@pytest.mark.parametrize("content", [b"", b"a,b,c\n1,2,3\n", b'{"a": 1}', b"\x1f\x8bnot gzip", b"\xff\xff"])
def test_an_unknown_format_is_a_one_line_error(tmp_path, content):
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    with pytest.raises(WorkloadError) as caught:
        detect(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
