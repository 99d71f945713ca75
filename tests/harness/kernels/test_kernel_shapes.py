"""The grammar of attention shapes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.backends.conformance.scenario import Row
from backbench.errors import HarnessError
from backbench.harness.kernels.shapes import format_shape, parse_shape


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("8q1s32k", [Row(1, 32768)] * 8),
        ("8q2k", [Row(2048, 2048)] * 8),
        ("2q4k_3q1s1k", [Row(1, 1024)] * 3 + [Row(4096, 4096)] * 2),
        ("1Q7S100", [Row(7, 100)]),
    ],
)
def test_shapes_are_read(text: str, rows: list[Row]) -> None:
    assert list(parse_shape(text)) == rows


@pytest.mark.parametrize(
    "text", ["", "8", "8q", "q1s4", "8q1s", "0q1", "1q0", "1q8s4", "8q1s32m", "8q1_", "-1q2"]
)
def test_anything_else_is_one_line(text: str) -> None:
    with pytest.raises(HarnessError) as raised:
        parse_shape(text)
    assert "\n" not in str(raised.value) and repr(text) in str(raised.value)


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5000), st.integers(0, 70_000)), min_size=1, max_size=5
    )
)
def test_what_is_written_reads_back(groups: list[tuple[int, int, int]]) -> None:
    rows = [Row(query, query + context) for count, query, context in groups for _ in range(count)]
    ordered = tuple(sorted(rows, key=lambda row: row.query != 1))
    assert parse_shape(format_shape(ordered)) == ordered
