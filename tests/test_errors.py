"""What an error prints cannot steer a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import BackbenchError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, with ümlauts and 漢字", "plain, with ümlauts and 漢字"),
        ("a\tb\n", "a\tb\n"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\ud800b", r"a\ud800b"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\r\x07\x9b", r"\r\x07\x9b"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters()))
def test_printable_text_can_be_written_and_stays_as_it_is(text: str) -> None:
    once = printable(text)
    once.encode("utf-8")
    assert not {*once} & {chr(code) for code in (*range(9), *range(11, 32), *range(127, 160))}
    assert printable(once) == once


def test_an_error_is_printable() -> None:
    assert str(BackbenchError("no file \x1b]0;title\x07")) == r"no file \x1b]0;title\x07"
