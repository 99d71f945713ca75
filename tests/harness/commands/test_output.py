"""What is printed, whatever the text holds and whatever stdout is."""

from __future__ import annotations

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backbench.errors import printable
from backbench.harness.commands.output import (
    LONGEST_LINE,
    echo,
    error_line,
    open_streams,
    print_json,
    print_table,
)


@given(st.text(max_size=400))
def test_nothing_printed_can_steer_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in shown if each not in "\t\n")


@given(st.text(max_size=6000))
def test_an_error_is_one_short_line(text: str) -> None:
    line = error_line(text)
    assert len(line) <= LONGEST_LINE < 300
    assert len(line.splitlines()) == 1
    assert line.startswith("error: ")


def test_a_long_error_keeps_its_advice() -> None:
    line = error_line(f"Unknown model {'a' * 5000}; did you mean tiny?")
    assert line.startswith("error: Unknown model aaa")
    assert line.endswith("did you mean tiny?")


def test_escapes_from_records_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x9b31m"
    print_table(f"title {evil} [bold]", (f"column {evil}", "b"), [(f"cell {evil}", "[red]x")])
    echo(evil)
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x9b" not in out
    assert out.count("\\x1b]0;owned\\x07\\x9b31m") == 4
    assert "[bold]" in out and "[red]x" in out


def test_json_is_ascii_and_whole(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"µ": "\x1b é", "inf": float("inf")}
    print_json(value | {"stray": "\ud800"})
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out
    assert json.loads(out) == {"µ": "\\x1b é", "inf": None, "stray": "\\ud800"}


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_a_narrow_stdout_gets_a_plainer_table(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    open_streams()
    print_table("Rates", ("Name", "µs"), [("a — b", "3 × 4 ≥ 5"), ("\udcff", "漢")])
    stream.flush()
    written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "Rates" in written and "\\udcff" in written
    if encoding == "ascii":
        assert "a - b" in written and "3 x 4 >= 5" in written and "\\u6f22" in written
