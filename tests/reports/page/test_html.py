"""The page is one file, the same bytes each time, small enough, and safe whatever the record says."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from backbench.errors import ReportError
from backbench.reports.page import html
from backbench.reports.page.html import MAX_BYTES, render_report, script_json, write_report
from backbench.reports.record import RunDirectory

HOSTILE = "</script><script>alert(1)</script><!--<script>&\u2028'\"{{ 7 * 7 }}"


class Page(HTMLParser):
    """Collects what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        self._script = tag == "script"
        if self._script:
            self.scripts.append("")
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in ("src", "href") if name in found]

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data


def test_same_records_same_bytes(gpu_runs: list[RunDirectory], tmp_path: Path) -> None:
    paths = [run.path for run in gpu_runs]
    write_report(paths, tmp_path / "a.html")
    write_report(paths, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_bytes_do_not_depend_on_the_hash_seed(cpu_run: RunDirectory, tmp_path: Path) -> None:
    import subprocess
    import sys

    module = "backbench.reports.page.html"
    code = f"import sys; from {module} import write_report; write_report([sys.argv[1]], sys.argv[2])"
    pages = []
    for seed in ("1", "2"):
        page = tmp_path / f"{seed}.html"
        command = [sys.executable, "-c", code, str(cpu_run.path), str(page)]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(html.__file__).parents[3])}
        subprocess.run(command, check=True, env=environment)
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]


def test_one_file_that_loads_nothing(gpu_runs: list[RunDirectory]) -> None:
    text = render_report(gpu_runs)
    assert len(text.encode()) <= MAX_BYTES
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "default-src 'none'" in text


def test_ids_are_unique_and_links_lead_somewhere(cpu_run: RunDirectory, gpu_runs: list[RunDirectory]) -> None:
    for runs in ([cpu_run], gpu_runs):
        page = Page(render_report(runs))
        assert len(set(page.ids)) == len(page.ids)
        assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_structure_a_screen_reader_needs(cpu_run: RunDirectory) -> None:
    page = Page(render_report([cpu_run]))
    names = [tag for tag, _ in page.tags]
    assert {"main", "header", "nav", "footer", "h1", "caption", "figcaption"} <= set(names)
    assert names.count("h1") == 1
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("aria-label") for _, attributes in page.tags if attributes.get("role") == "img")


def test_hostile_text_stays_text(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run()
    record = run.read_record()
    run.write_record(
        replace(
            record,
            model=record.model | {"name": HOSTILE},
            backend=record.backend | {"asked": HOSTILE},
            workload=record.workload | {"notes": [HOSTILE], "name": HOSTILE},
            validity=[HOSTILE],
        )
    )
    text = render_report([run])
    assert "<script>alert" not in text
    assert "49" not in re.findall(r"<h1[^>]*>(.*?)</h1>", text)[0]
    page = Page(text)
    assert len(page.scripts) == 3
    assert json.loads(page.scripts[0])["records"][0]["validity"] == [HOSTILE]


def test_script_json_cannot_end_its_element() -> None:
    text = script_json({"a": HOSTILE, "b": float("nan")})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": HOSTILE, "b": None}


def test_the_download_holds_the_whole_records(gpu_runs: list[RunDirectory]) -> None:
    data = json.loads(Page(render_report(gpu_runs)).scripts[0])
    for run, embedded in zip(gpu_runs, data["records"], strict=True):
        assert embedded == json.loads((run.path / "run.json").read_text())
    assert "metrics.tpot_s.p50" in data["csv"]


def test_incomparable_runs_get_a_banner_and_no_ratios(
    cpu_run: RunDirectory, make_run: Callable[..., RunDirectory]
) -> None:
    other = make_run("NVIDIA", "triton", requests=80)
    text = render_report([cpu_run, other])
    body = text[: text.index('<script type="application/json"')]
    assert "These runs do not compare" in body
    assert "prompt tokens: " in body
    assert not re.search(r"\d×", body[: body.index('id="where"')])


def test_an_interrupted_run_without_rows_has_a_page(cpu_run: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run")
    record = cpu_run.read_record()
    run.write_record(
        replace(
            record,
            run=record.run | {"status": "interrupted"},
            metrics={"context": record.metrics["context"]},
            **{name: {} for name in ("memory", "schedule", "correctness", "roofline", "backend")},
        )
    )
    run.write_requests(cpu_run.read_requests().iloc[:0])
    run.write_steps(cpu_run.read_steps().iloc[:0])
    run.write_telemetry(cpu_run.read_telemetry().iloc[:0])
    assert "Interrupted" in render_report([run])


def test_only_a_page_is_replaced(cpu_run: RunDirectory, tmp_path: Path) -> None:
    data, page, pipe = tmp_path / "data.csv", tmp_path / "a.html", tmp_path / "pipe"
    data.write_text("1,2\n")
    os.mkfifo(pipe)
    for out in (data, pipe, tmp_path, Path("/dev/null"), cpu_run.path / "run.json"):
        with pytest.raises(ReportError, match="no HTML page"):
            write_report([cpu_run.path], out)
    assert data.read_text() == "1,2\n"
    write_report([cpu_run.path], page)
    write_report([cpu_run.path], page)


def test_errors_are_one_line(cpu_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="at least one run"):
        write_report([], tmp_path / "a.html")
    with pytest.raises(ReportError, match="no run directory"):
        write_report([tmp_path / "nowhere"], tmp_path / "a.html")
    with pytest.raises(ReportError, match="Cannot write"):
        write_report([cpu_run.path], tmp_path / "missing" / "a.html")
    monkeypatch.setattr(html, "MAX_BYTES", 1000)
    with pytest.raises(ReportError, match="fewer runs"):
        write_report([cpu_run.path], tmp_path / "a.html")
    assert list(tmp_path.iterdir()) == []
