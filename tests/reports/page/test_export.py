"""A report is a page, Markdown or CSV by its suffix; it replaces a report and nothing else."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from backbench.errors import ReportError
from backbench.reports.page import export
from backbench.reports.page.export import require_writable, write_report
from backbench.reports.quantities import QUANTITIES, format_value, quantity, read
from backbench.reports.record import RunDirectory

RATE = quantity("metrics", "output_tokens_per_s", "whole_run")


def test_markdown_has_the_answer_and_the_numbers(gpu_runs: list[RunDirectory], tmp_path: Path) -> None:
    out = tmp_path / "report.md"
    write_report([run.path for run in gpu_runs], out)
    text = out.read_text()
    assert "One run each: no verdict." in text
    assert "**Synthetic, not measured:**" in text
    for run in gpu_runs:
        assert format_value(read(run.read_record(), RATE).value, "tok/s") in text
    for title in ("What differs", "Scorecard", "Comparison", "Latency", "Validity"):
        assert f"### {title}" in text
    write_report([gpu_runs[0].path], out)
    assert "### Summary" in out.read_text()


def test_csv_has_every_quantity_of_every_run_unrounded(gpu_runs: list[RunDirectory], tmp_path: Path) -> None:
    out = tmp_path / "report.csv"
    write_report([run.path for run in gpu_runs], out)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == len(gpu_runs) * len(QUANTITIES)
    wanted = [row for row in rows if row["quantity"] == ".".join(RATE.path)]
    assert [float(row["value"]) for row in wanted] == [
        read(run.read_record(), RATE).value for run in gpu_runs
    ]


def test_figures_are_svg_files_of_their_own(
    gpu_runs: list[RunDirectory], make_run: Callable[..., RunDirectory], tmp_path: Path
) -> None:
    runs = [*gpu_runs, make_run("AMD", "torch", seed=4)]
    write_report([run.path for run in runs], tmp_path / "a.html", figures=tmp_path / "figures")
    files = sorted((tmp_path / "figures").iterdir())
    assert {"ranking.svg", "front.svg", "ttft.svg", "time-0.svg", "decode.svg"} <= {f.name for f in files}
    for file in files:
        text = file.read_text()
        root = ElementTree.fromstring(text)
        known = {each.get("id") for each in root.iter()}
        used = {each.get("href", "")[1:] for each in root.iter("{http://www.w3.org/2000/svg}use")}
        assert used <= known
        assert "--run-0:" in text
    again = tmp_path / "again"
    write_report([run.path for run in runs], tmp_path / "a.html", figures=again)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in sorted(again.iterdir())]


@pytest.mark.parametrize("suffix", [".html", ".md", ".csv"])
def test_only_a_report_is_replaced(cpu_run: RunDirectory, tmp_path: Path, suffix: str) -> None:
    data, page, pipe = (tmp_path / f"{name}{suffix}" for name in ("data", "page", "pipe"))
    data.write_text("1,2\n")
    os.mkfifo(pipe)
    folder = tmp_path / f"folder{suffix}"
    folder.mkdir()
    for out in (data, pipe, folder):
        with pytest.raises(ReportError, match=r"holds something else|not a regular file"):
            write_report([cpu_run.path], out)
    assert data.read_text() == "1,2\n"
    write_report([cpu_run.path], page)
    before = page.read_bytes()
    write_report([cpu_run.path], page)
    assert page.read_bytes() == before


@pytest.mark.parametrize("name", ["report", "report.pdf", "run.json"])
def test_the_suffix_says_what_it_is(name: str) -> None:
    with pytest.raises(ReportError, match=r"\.html, \.md, \.csv") as found:
        require_writable(Path(name))
    assert len(str(found.value)) < 300


def test_errors_are_one_line(cpu_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="at least one run"):
        write_report([], tmp_path / "a.html")
    with pytest.raises(ReportError, match="no run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "a.html")
    with pytest.raises(ReportError, match="Cannot write"):
        write_report([cpu_run.path], tmp_path / "missing" / "a.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="Cannot make the folder"):
        write_report([cpu_run.path], tmp_path / "b.html", figures=tmp_path / "file")
    (tmp_path / "b.html").unlink()
    (tmp_path / "file").unlink()
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(ReportError, match="fewer runs"):
        write_report([cpu_run.path], tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
