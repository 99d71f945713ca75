"""The page is one file, the same bytes each time, small enough, and safe whatever the record says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from backbench.reports.compare import LONGEST_NAME
from backbench.reports.page.export import write_report
from backbench.reports.page.html import load_page, render_report, script_json
from backbench.reports.quantities import QUANTITIES
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

    module = "backbench.reports.page.export"
    code = f"import sys; from {module} import write_report; write_report([sys.argv[1]], sys.argv[2])"
    pages = []
    for seed in ("1", "2"):
        page = tmp_path / f"{seed}.html"
        command = [sys.executable, "-c", code, str(cpu_run.path), str(page)]
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[3])}
        subprocess.run(command, check=True, env=environment)
        pages.append(page.read_bytes())
    assert pages[0] == pages[1]


def test_one_file_that_loads_nothing(gpu_runs: list[RunDirectory]) -> None:
    text = render_report(gpu_runs)
    page = Page(text)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert "default-src 'none'" in text


def test_a_single_run_stays_below_a_megabyte(cpu_run: RunDirectory) -> None:
    assert len(render_report([cpu_run]).encode()) < 1_000_000


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
    assert len(page.scripts) == 2
    assert json.loads(page.scripts[0])["records"][0]["validity"] == [HOSTILE]


RTL = "مرحبا שלום"


def test_long_and_right_to_left_names_are_shortened_and_isolated(
    make_run: Callable[..., RunDirectory],
) -> None:
    runs = [make_run(seed=seed) for seed in (1, 2)]
    for run, name in zip(runs, ("x" * 10_000, f"\u202e{RTL}"), strict=True):
        record = run.read_record()
        run.write_record(replace(record, backend=record.backend | {"asked": name}))
    text = render_report(runs)
    body = text[: text.index('<section id="provenance"')]
    assert "x" * (LONGEST_NAME + 1) not in body[: body.index('<section id="what"')]
    assert f"<bdi>{'x' * LONGEST_NAME}</bdi>" in body
    assert f"{RTL}</bdi>" in body
    assert "\u202e" not in text


def test_the_page_says_what_is_synthetic(
    cpu_run: RunDirectory, make_run: Callable[..., RunDirectory]
) -> None:
    assert "These records were made by a model" in render_report([cpu_run])
    run = make_run(backend="sdpa")
    record = run.read_record()
    run.write_record(replace(record, run={k: v for k, v in record.run.items() if k != "synthetic"}))
    assert "Synthetic." not in render_report([run])
    assert "torch: these records were made by a model" in render_report([cpu_run, run])


def test_of_three_runs_the_ranking_stands_before_any_paragraph(gpu_runs: list[RunDirectory]) -> None:
    text = render_report(gpu_runs)
    assert text.index('id="figure-ranking"') < text.index("<p ", text.index("<main"))
    assert 'id="figure-ranking"' not in render_report(gpu_runs[:2])


def test_names_of_two_machines_say_the_machine(gpu_runs: list[RunDirectory]) -> None:
    page = load_page([gpu_runs[0].path, gpu_runs[2].path])
    assert page.names == ["torch · NVIDIA H200", "triton · AMD Instinct MI300X"]


def test_the_outline_is_in_order(gpu_runs: list[RunDirectory]) -> None:
    row = {"utc": "2026-01-01", "gate": "nightly", "verdict": "pass", "metric": "tpot_p50", "loss": 0.01}
    row |= {"low": -0.01, "high": 0.03, "margin": 0.03, "detectable": 0.02}
    quantized = gpu_runs[0].read_record()
    text = render_report(gpu_runs, [row])
    names = ["top", "what", "front-section", "scorecard-section", "distributions", "time-section"]
    names += ["memory-section", "where", "gates-section", "validity", "provenance", "glossary"]
    assert re.findall(r'<section[^>]* id="([^"]+)"', text) == names
    assert quantized.model["quantization"] is None
    assert "could have seen" in text.lower()


def test_quantized_weights_stand_beside_their_speed(make_run: Callable[..., RunDirectory]) -> None:
    run = make_run("NVIDIA", "triton")
    record = run.read_record()
    run.write_record(replace(record, model=record.model | {"quantization": "fp8"}))
    text = render_report([run])
    table = text[text.index('id="accuracy-section"') : text.index('id="validity"')]
    assert "float32, fp8" in table
    assert "100%" in table


def test_terms_are_explained_where_they_stand_and_in_the_glossary(cpu_run: RunDirectory) -> None:
    text = render_report([cpu_run])
    assert 'title="Energy' not in text
    definition = next(each.definition for each in QUANTITIES if each.label == "Requests/s")
    assert f'title="{definition}"' in text
    assert definition in text[text.index('id="glossary"') :]


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
    assert 'id="figure-ranking"' not in body


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
