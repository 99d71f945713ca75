"""Text as it becomes certain: put together it is the text of all tokens, whatever the cuts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backbench.engine.models.checkpoint import find_model
from backbench.harness.serving.text import REPLACEMENT, TextStream


@cache
def tokenizer() -> Any:
    return find_model("tiny").tokenizer()


class Letters:
    """Each token id is one character."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, token_ids))


def pieces(stream: TextStream, token_ids: list[int], reason: str = "length") -> list[str]:
    last = len(token_ids) - 1
    return [stream.push(each, reason if i == last else None) for i, each in enumerate(token_ids)]


@settings(deadline=None)
@given(st.text(min_size=1))
def test_the_pieces_of_any_text_are_that_text(text: str) -> None:
    token_ids = tokenizer().encode(text)
    assert "".join(pieces(TextStream(tokenizer()), token_ids)) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, 4095), min_size=1, max_size=40), st.booleans())
def test_the_pieces_of_any_tokens_are_their_text(token_ids: list[int], skip: bool) -> None:
    stream = TextStream(tokenizer(), skip_special_tokens=skip)
    whole = tokenizer().decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(stream, token_ids)) == whole


@pytest.mark.parametrize("character", ["ཀ", "好", "🙂"])
def test_a_character_of_several_tokens_comes_whole(character: str) -> None:
    token_ids = tokenizer().encode(character)
    assert len(token_ids) > 1
    found = pieces(TextStream(tokenizer()), [*token_ids, *tokenizer().encode("a")])
    assert found == [""] * (len(token_ids) - 1) + [character, "a"]
    cut = pieces(TextStream(tokenizer()), token_ids[:-1])
    assert REPLACEMENT in cut[-1]


def letters(text: str) -> list[int]:
    return [ord(each) for each in text]


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stream = TextStream(Letters(), ["stop", "op!"])
    assert pieces(stream, letters("a stone")) == ["a", " ", "", "", "", "ston", "e"]
    assert pieces(TextStream(Letters(), ["stop"]), letters("a sto"))[-1] == "sto"


@pytest.mark.parametrize(("keep", "whole"), [(False, "a "), (True, "a stop")])
def test_the_stop_string_is_cut_off_unless_it_is_kept(keep: bool, whole: str) -> None:
    stream = TextStream(Letters(), ["stop", "never"], keep_stop=keep)
    assert "".join(pieces(stream, letters("a stop"), "stop")) == whole


def test_an_end_of_sequence_cuts_nothing_off() -> None:
    assert "".join(pieces(TextStream(Letters(), ["stop"]), letters("a sto"), "stop")) == "a sto"


@settings(deadline=None)
@given(st.text("abc", min_size=1, max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_no_piece_shows_what_is_cut_off_later(text: str, stops: list[str]) -> None:
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    seen = text[: min(ends)] if ends else text  # the engine ends a sequence with the first stop string
    stream = TextStream(Letters(), stops)
    found = "".join(pieces(stream, letters(seen), "stop" if ends else "length"))
    cuts = [at for stop in stops if ends and (at := seen.find(stop)) >= 0]
    assert found == seen[: min(cuts)] if cuts else found == seen
