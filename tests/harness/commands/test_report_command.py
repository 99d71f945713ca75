"""Where `bench report` may write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backbench.errors import ReportError
from backbench.harness.cli import run_command
from backbench.harness.commands.report import require_page


@pytest.mark.parametrize("held", [None, "", "<!doctype html>\n<html>", "\n<!DOCTYPE HTML>"])
def test_a_new_name_an_empty_file_and_a_page_may_be_written(tmp_path: Path, held: str | None) -> None:
    out = tmp_path / "page.html"
    if held is not None:
        out.write_text(held)
    assert require_page(out) == out


@pytest.mark.parametrize("held", ["my notes", "{}", "\x00\x01", "PAR1"])
def test_another_file_is_not_replaced(tmp_path: Path, held: str) -> None:
    out = tmp_path / "page.html"
    out.write_text(held)
    with pytest.raises(ReportError, match="something else than a report"):
        require_page(out)
    assert out.read_text() == held


def test_devices_pipes_and_directories_are_not_replaced(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for out in (Path("/dev/null"), pipe, link, tmp_path):
        with pytest.raises(ReportError, match="not a regular file"):
            require_page(out)


def test_a_dangling_link_is_no_page(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(ReportError):
        require_page(link)


def test_the_command_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", "runs/any", "-o", "/dev/null"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/dev/null is not a regular file" in line
