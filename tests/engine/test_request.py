"""What a request may ask for: everything else is refused in one short line that says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from backbench.engine.request import SamplingParams, as_token_ids
from backbench.errors import EngineError


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 2.0},
        {"max_tokens": True},
        {"max_tokens": 2**31},
        {"max_tokens": None},
        {"temperature": -0.1},
        {"temperature": 1e-38},
        {"temperature": 1e-39},
        {"temperature": 1e308},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "1"},
        {"min_tokens": -1},
        {"min_tokens": 17},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_k": 2**31},
        {"top_k": 2**32 + 1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"top_p": None},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"n": 0},
        {"n": 1.0},
        {"n": 10**9},
        {"seed": 0.5},
        {"seed": 2**64},
        {"stop": "abc"},
        {"stop": ""},
        {"stop": ("",)},
        {"stop": (5,)},
        {"stop": 5},
        {"stop_token_ids": 5},
        {"stop_token_ids": (1.0,)},
        {"stop_token_ids": "5"},
        {"forced_tokens": (1, 2), "max_tokens": 3},
        {"forced_tokens": (1, 2.0), "max_tokens": 2},
        {"forced_tokens": ("1",), "max_tokens": 1},
        {"forced_tokens": 7, "max_tokens": 1},
        {"stop": "x" * 5000},
    ],
    ids=lambda wrong: repr(wrong)[:40],
)
def test_parameters_out_of_range_or_of_another_kind(wrong: dict[str, Any]) -> None:
    with pytest.raises(EngineError) as caught:
        SamplingParams(**wrong)
    message = str(caught.value)
    assert message.startswith(next(iter(wrong)))
    assert "\n" not in message and len(message) < 300


def test_numbers_of_other_libraries_and_extremes_are_taken() -> None:
    SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.7), top_k=np.int32(5), seed=-1)
    SamplingParams(temperature=1e-30, top_k=2**31 - 1, seed=2**64 - 1, stop=("a", "bc"), n=16384)


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_each_filter_alone_makes_a_request_filtered(filters: dict[str, Any]) -> None:
    assert SamplingParams(**filters).filters
    assert not SamplingParams(temperature=1.0).filters


def test_token_ids_become_plain_integers() -> None:
    ids = as_token_ids(np.arange(3), "The prompt", 3)
    assert ids == [0, 1, 2]
    assert {type(token) for token in ids} == {int}


@pytest.mark.parametrize("values", [["x"], [1.0], "12", None, [2**70], [[1]]], ids=repr)
def test_what_is_no_token_id(values: Any) -> None:
    with pytest.raises(EngineError, match=r"The prompt must be token ids, whole numbers, not "):
        as_token_ids(values, "The prompt", 97)


@pytest.mark.parametrize("wrong", [-1, 97, 10**6])
def test_token_ids_outside_the_vocabulary(wrong: int) -> None:
    with pytest.raises(EngineError, match=f"The prompt: token id {wrong} is outside the vocabulary of 97"):
        as_token_ids([1, wrong, 2], "The prompt", 97)
