"""Streams as servers send them: whole, in pieces, and damaged."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.harness.subjects.url.stream import LONGEST_EVENT, Answer, EventStream, StreamError, message_of


def chunk(text: str | None = " a", **more: Any) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": None}]
    return json.dumps({"choices": choices} | more).encode()


def delta(**fields: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}).encode()


def usage(completion: int, prompt: int = 3) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


WHOLE = b': hello\r\ndata: {"a": 1}\r\n\r\nevent: x\nid: 7\ndata:{"b":2}\n\ndata: [DONE]\n\n'
EVENTS = [b'{"a": 1}', b'{"b":2}', b"[DONE]"]


@given(st.lists(st.integers(0, len(WHOLE)), max_size=8))
def test_events_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]) -> None:
    stream, found = EventStream(), []
    for start, end in pairwise([0, *sorted(cuts), len(WHOLE)]):
        found += stream.feed(WHOLE[start:end])
    assert found == EVENTS


def test_lines_of_one_event_are_joined_and_an_unfinished_one_waits() -> None:
    stream = EventStream()
    assert stream.feed(b"data: one\ndata: two\n") == []
    assert stream.feed(b"\n") == [b"one\ntwo"]
    assert stream.feed(b"data: three\n") == []


@pytest.mark.parametrize("line", [b'{"error": "no"}\n', b"<html>\n", b"HTTP/1.1 500\n", b"dat: {}\n"])
def test_what_is_no_stream_is_said(line: bytes) -> None:
    with pytest.raises(StreamError, match="malformed stream"):
        EventStream().feed(line)


def test_an_endless_event_is_refused() -> None:
    stream = EventStream()
    with pytest.raises(StreamError, match="malformed stream"):
        for _ in range(LONGEST_EVENT // 2**16 + 2):
            stream.feed(b"data: " + b"x" * 2**16 + b"\n")
    with pytest.raises(StreamError, match="malformed stream"):
        EventStream().feed(b"x" * (LONGEST_EVENT + 1))


def test_counts_that_the_server_gives_with_each_chunk() -> None:
    answer = Answer()
    assert answer.take(chunk("", **usage(0))) == 0
    assert answer.take(chunk(" a", **usage(1))) == 1
    assert answer.take(chunk(" b c", **usage(4))) == 3
    assert answer.take(chunk("", **usage(5))) == 1, "a token without text is a token"
    assert answer.take(chunk(None, **usage(5))) == 0
    assert (answer.total, answer.one_each, answer.done) == (5, False, False)
    assert answer.take(b"[DONE]") == 0
    assert answer.done


def test_ids_count_themselves() -> None:
    answer = Answer()
    body = {"choices": [{"index": 0, "text": "", "token_ids": [5, 6]}]}
    assert answer.take(json.dumps(body).encode()) == 2
    assert answer.token_ids == [5, 6]


def test_chunks_without_counts_are_one_token_each_where_the_total_says_so() -> None:
    answer = Answer()
    assert [answer.take(chunk()) for _ in range(3)] == [None] * 3
    assert not answer.one_each, "nothing is known before the total"
    answer.take(chunk(None, **usage(3)))
    assert answer.one_each


def test_a_total_beyond_the_chunks_leaves_them_unknown() -> None:
    answer = Answer()
    for _ in range(3):
        answer.take(chunk())
    answer.take(chunk(None, **usage(4)))
    assert (answer.total, answer.one_each) == (4, False)


def test_a_total_in_the_last_chunk_of_uncounted_ones_is_not_that_chunks() -> None:
    answer = Answer()
    answer.take(chunk())
    assert answer.take(chunk(**usage(2))) is None
    assert answer.one_each


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"role": "assistant", "content": ""}, 0),
        ({"content": "a"}, None),
        ({"reasoning_content": "a"}, None),
        ({"reasoning": "a", "content": None}, None),
        ({"tool_calls": [{"index": 0}]}, None),
        ({}, 0),
    ],
)
def test_what_of_a_chat_is_a_token(fields: dict[str, Any], count: int | None) -> None:
    """A role is none: it must not be taken for the first token. Reasoning is generated as well."""
    assert Answer().take(delta(**fields)) == count


@pytest.mark.parametrize(
    "event",
    [
        b"{",
        b"[]",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b"{}",
        b'{"choices": {"a": 1}}',
        b'{"choices": [7]}',
        b'{"choices": [null]}',
        b'{"choices": [{"delta": 7}]}',
        b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": "7"}}',
        b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": -1}}',
        b'{"choices": [{"text": "a"}], "usage": {"completion_tokens": 1e3}}',
        b'{"choices": [{"text": "a", "token_ids": ["x"]}]}',
        b"[" * 100_000,
    ],
)
def test_a_malformed_event_is_an_error_of_its_request(event: bytes) -> None:
    with pytest.raises(StreamError, match="malformed stream"):
        Answer().take(event)


def test_counts_never_go_down() -> None:
    answer = Answer()
    answer.take(chunk(**usage(3)))
    with pytest.raises(StreamError, match="went down"):
        answer.take(chunk(**usage(2)))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: (
            st.lists(x)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "usage", "text", "delta", "completion_tokens", "token_ids", "error"]
                ),
                x,
            )
        ),
        max_leaves=20,
    )
)
def test_any_json_is_a_chunk_or_an_error(data: Any) -> None:
    answer = Answer()
    try:
        count = answer.take(json.dumps(data).encode())
    except StreamError as error:
        assert len(str(error)) < 250 and "\n" not in str(error)
    else:
        assert count is None or count >= 0


@pytest.mark.parametrize(
    "error",
    [
        {"message": "no  memory\nleft"},
        {"error": {"message": "no memory left"}},
        {"detail": "no memory left"},
        "no memory left",
    ],
)
def test_a_servers_words_are_found_and_on_one_line(error: Any) -> None:
    assert message_of(error) == "no memory left"
    with pytest.raises(StreamError, match="the server failed: no memory left"):
        Answer().take(json.dumps({"error": error}).encode())


def test_a_servers_words_are_short() -> None:
    assert len(message_of("x" * 10_000)) == 120
