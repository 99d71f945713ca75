from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.request import SamplingParams
from backbench.engine.scheduling.sequence import Sequence
from backbench.engine.speculation.ngram import LONGEST, SHORTEST, lookup


def sequence(tokens: list[int]) -> Sequence:
    return Sequence("a", 0, tokens, SamplingParams(), 0)


def searched(known: list[int], tokens: int) -> list[int]:
    """The same by a plain search from the end."""
    for length in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(known) - 1, length - 1, -1):
            if known[end - length : end] == known[len(known) - length :]:
                text = list(known)
                for i in range(tokens):
                    text.append(text[end + i])
                return text[len(known) :]
    return []


def test_the_longest_match_wins_over_a_later_one() -> None:
    assert lookup(sequence([1, 2, 3, 4, 7, 9, 4, 8, 3, 4, 6, 1, 2, 3, 4]), 3) == [7, 9, 4]


def test_a_period_is_continued_past_the_end() -> None:
    assert lookup(sequence([5, 9, 2, 5, 9, 2, 5]), 6) == [9, 2, 5, 9, 2, 5]


def test_no_match_no_draft() -> None:
    assert lookup(sequence([1, 2, 3, 4]), 4) == []
    assert lookup(sequence([1]), 4) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.lists(st.integers(1, 4)), st.integers(0, 5))
def test_an_index_that_grows_finds_what_a_search_finds(
    tokens: list[int], steps: list[int], count: int
) -> None:
    growing = sequence(tokens[:1])
    for step in [*steps, len(tokens)]:
        growing.token_ids += tokens[len(growing.token_ids) :][:step]
        assert lookup(growing, count) == searched(growing.token_ids, count)
