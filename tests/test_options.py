"""One declaration of an option, and the values it takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import BackbenchError, EngineError
from backbench.options import DTYPES, LONGEST_TEXT, option, options_of, settle


@dataclass(frozen=True)
class Settings:
    count: int | None = option(None, "How many.", group="load", minimum=1, maximum=100)
    share: float = option(0.5, "Which part.", group="load", above=0, maximum=1)
    wide: bool = option(True, "Whether.", group="load")
    span_s: tuple[float, float] | None = option(None, "When.", name="span", group="load", minimum=0)
    name: str = option("a", "Who.", group="load")
    file: Path | None = option(None, "Where.", group="load")
    dtype: str | None = option(None, "In what.", group="load", choices=DTYPES)

    def __post_init__(self) -> None:
        settle(self, EngineError)


def test_values_are_stored_in_their_own_type() -> None:
    held = Settings(
        count=np.int64(3),  # type: ignore[arg-type]
        share=1,
        span_s=[1, 2.5],  # type: ignore[arg-type]
        name=Path("x"),  # type: ignore[arg-type]
        file="y",  # type: ignore[arg-type]
        dtype="bf16",
    )
    assert held == Settings(3, 1.0, True, (1.0, 2.5), "x", Path("y"), "bfloat16")
    assert [type(each) for each in (held.count, held.share)] == [int, float]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"count": 0}, "--count must be at least 1 and at most 100, not 0"),
        ({"count": 101}, "not 101"),
        ({"count": 2.0}, "a whole number"),
        ({"count": True}, "a whole number"),
        ({"count": "3"}, "a whole number"),
        ({"share": 0}, "above 0 and at most 1, not 0"),
        ({"share": float("nan")}, "not nan"),
        ({"share": float("inf")}, "not inf"),
        ({"share": 10**400}, "not inf"),
        ({"share": None}, "--share must be a number"),
        ({"wide": 1}, "true or false"),
        ({"span_s": (1,)}, "--span must be two numbers"),
        ({"span_s": (0, float("nan"))}, "--span"),
        ({"span_s": (-1, 2)}, "--span must be at least 0"),
        ({"name": 3}, "text"),
        ({"name": "a" * (LONGEST_TEXT + 1)}, "at most 4096 characters"),
        ({"file": "a\0b"}, "NUL"),
        ({"dtype": "fp8"}, "--dtype must be one of float32, bfloat16, float16, fp32, bf16, fp16; not 'fp8'"),
    ],
    ids=str,
)
def test_a_wrong_value_is_one_line(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError) as caught:
        Settings(**wrong)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats())))
def test_any_value_is_taken_within_bounds_or_refused(value: Any) -> None:
    for each in options_of(Settings):
        try:
            found = each.accept(value)
        except BackbenchError:
            continue
        if each.name == "count" and found is not None:
            assert type(found) is int and 1 <= found <= 100
        if each.name == "share":
            assert type(found) is float and 0 < found <= 1
