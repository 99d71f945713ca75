"""The readers of files that hold text: ShareGPT and a user's own OpenAI log; and how a format is told."""

import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.errors import WorkloadError
from backbench.workloads.readers import sharegpt
from backbench.workloads.readers.detect import detect
from backbench.workloads.readers.openai import read_openai
from backbench.workloads.readers.sharegpt import Conversation, read_array, read_sharegpt


def chat(*turns: tuple[str, str]) -> dict:
    return {"id": "x", "conversations": [{"from": role, "value": text} for role, text in turns]}


def tokenize(text: str) -> list[int]:
    return [ord(character) % 100 for character in text]


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
        patch.setattr(sharegpt, "CHUNK_CHARACTERS", chunk)
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
        (f"[\n{GOOD},\n7]", "line 3, field conversations"),
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
        (GOOD, "line 1, field (the array)"),
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
    rows = [row for row, timed in read_openai(path, tokenize) if timed]
    assert [row.arrival_ns for row in rows] == [0, 500_000_000, 1_000_000_000]
    assert rows[0].prompt == (1, 2, 3)
    assert (rows[1].prompt, rows[1].output_tokens, rows[1].temperature) == (tuple(tokenize("ab")), 7, 0.5)
    assert rows[2].prompt == tuple(tokenize("user: hi"))


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
        list(read_openai(path, tokenize))
    assert str(caught.value).startswith(f"{path}, line 2, field {field}:")


def test_text_without_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"prompt": "x", "max_tokens": 1}')
    with pytest.raises(WorkloadError, match="tokenizer"):
        list(read_openai(path, None))


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
