from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.engine.config import EngineConfig
from backbench.engine.speculation.asked import (
    MOST_TOKENS,
    Speculation,
    conditional_rate,
    mean_length,
    parse_speculation,
)
from backbench.errors import EngineError


def test_forms() -> None:
    assert parse_speculation("ngram:4") == Speculation("ngram", 4)
    assert parse_speculation("draft:tiny-draft:2") == Speculation("draft", 2, "tiny-draft")
    assert parse_speculation("draft:shape:qwen3-0.6b:15") == Speculation("draft", 15, "shape:qwen3-0.6b")
    assert parse_speculation("eagle3:a/head:3") == Speculation("eagle3", 3, "a/head")
    rates = parse_speculation("synthetic:0.8/0.4/0").rates
    assert rates == pytest.approx((0.8, 0.5, 0.0))
    assert mean_length(rates) == pytest.approx(1 + 0.8 + 0.4)
    assert not parse_speculation("synthetic:1:2").accurate and parse_speculation("ngram:1").accurate


@given(st.integers(1, MOST_TOKENS), st.floats(0, 1))
def test_a_mean_length_is_reached(tokens: int, share: float) -> None:
    length = 1 + share * tokens
    assert mean_length((conditional_rate(length, tokens),) * tokens) == pytest.approx(length)


@pytest.mark.parametrize(
    "text",
    ["", "ngram", "ngram:0", "ngram:16", "ngram:0100", "ngram:x", "ngram:4:5", "draft:2", "draft::2",
     "eagle:2", "eagle3:2", "eagle3::2", "eagle3:head",
     "draft:tiny:-1", "synthetic:2.5", "synthetic:0.5:4", "synthetic:6:4", "synthetic:nan:4",
     "synthetic:0.4/0.8", "synthetic:1.2/0.1", "synthetic:a/b", "synthetic:-1/-2", "synthetic:" + "1/" * 16],
)  # fmt: skip
def test_refusals(text: str) -> None:
    with pytest.raises(EngineError) as error:
        EngineConfig(speculate=text)
    assert "--speculate" in str(error.value) and len(str(error.value)) < 300 and "\n" not in str(error.value)
