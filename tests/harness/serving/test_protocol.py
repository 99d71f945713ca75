"""Bodies as they come: a refusal that names what is wrong, or the values as they were meant."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.harness.serving.protocol import (
    NEUTRAL,
    Fields,
    Refused,
    read_delivery,
    read_json,
    read_messages,
    read_prompts,
    read_sampling,
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NAMES = (
    *(
        "prompt",
        "messages",
        "max_tokens",
        "max_completion_tokens",
        "min_tokens",
        "n",
        "best_of",
        "seed",
        "stop",
    ),
    *("temperature", "top_p", "top_k", "min_p", "stop_token_ids", "ignore_eos", "stream", "stream_options"),
    *("skip_special_tokens", "include_stop_str_in_output", "logit_bias", "tools", "nonsense", "user"),
)


def read(fields: Fields, chat: bool) -> Any:
    asked = read_messages(fields) if chat else read_prompts(fields)
    sampling = read_sampling(fields, 5, default_tokens=None, logprobs=False)
    delivery = read_delivery(fields)
    fields.end()
    return asked, sampling.params(64), delivery


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_refused(body: bytes) -> None:
    with suppress(Refused):
        read_json(body)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=6), st.booleans())
def test_any_values_are_read_or_refused_in_a_line(given_fields: dict[str, Any], chat: bool) -> None:
    try:
        read(read_json(json.dumps(given_fields).encode()), chat)
    except Refused as refused:
        assert 0 < len(str(refused)) < 300 and "\n" not in str(refused)


def test_values_as_they_were_meant() -> None:
    body = {
        "prompt": [[1, 2], [3]],
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "n": 3,
        "best_of": 3,
        "temperature": 1,
        "top_k": -1,
        "stop": "end",
        "stop_token_ids": [4],
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True, "include_usage": True},
    }
    prompts, params, delivery = read(read_json(b"\xef\xbb\xbf" + json.dumps(body).encode()), chat=False)
    assert prompts == [[1, 2], [3]]
    assert (params.max_tokens, params.min_tokens, params.n, params.seed) == (7, 2, 3, 5)
    assert (params.temperature, params.top_k, params.stop, params.stop_token_ids) == (1.0, 0, ("end",), (4,))
    assert params.ignore_eos and not params.logprobs
    assert delivery.stream and delivery.include_usage and delivery.continuous_usage


def test_no_length_is_as_much_as_there_is_room_for() -> None:
    sampling = read_sampling(Fields({}), 0, default_tokens=None, logprobs=False)
    assert sampling.params(64).max_tokens == 64
    assert read_sampling(Fields({}), 0, default_tokens=16, logprobs=False).params(64).max_tokens == 16


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_known_field_is_taken_only_where_it_asks_for_nothing(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        Fields({name: value}).end()
    with pytest.raises(Refused, match=f"^{name} is not served here"):
        Fields({name: "something else"}).end()
    with pytest.raises(Refused, match="is not known here"):
        Fields({name: NEUTRAL[name][0]}, "messages[0].").end()


def test_text_parts_are_put_together_and_names_are_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts, "name": "me"}, {"role": "assistant", "content": ""}]
    assert read_messages(Fields({"messages": messages})) == [
        {"role": "user", "content": "a\nb", "name": "me"},
        {"role": "assistant", "content": ""},
    ]


def test_a_refusal_can_be_sent_whatever_the_field_is_called() -> None:
    with pytest.raises(Refused) as refused:
        read_json(json.dumps({"\ud800" + "x" * 5000: 1}).encode()).end()
    sent = json.dumps(refused.value.body(), ensure_ascii=False).encode()
    assert len(sent) < 400
